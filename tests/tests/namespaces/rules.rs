//! `penstock-proxy init` against the real kernel, and what it prints against the real nft.

use std::net::SocketAddr;
use std::process::{Command, Output};
use std::time::Duration;

use penstock_tests::testkit::namespace::{Machine, Namespace, Network, possible};
use penstock_tests::testkit::process::program;

/// Every kind of rule at once.
const ALL_OPTIONS: [&str; 12] = [
    "--proxy-uid",
    "4711",
    "--skip-inbound-ports",
    "9090,7000-7100",
    "--skip-outbound-ports",
    "25,587,1-9",
    "--skip-subnets",
    "10.16.0.0/12,192.0.2.7,169.254.0.0/16,fd00::/8,2001:db8::/33,2001:db8::7,::ffff:1.2.3.4,fe80::/10",
    "--only-inbound-ports",
    "8000-8080",
    "--only-outbound-ports",
    "80,443",
];

fn init(namespace: &Namespace, args: &[&str]) -> Output {
    namespace.command(program("penstock-proxy")).arg("init").args(args).output().unwrap()
}

fn says(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", says(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What the real nft shows; `None` where it is not installed, which CI does not accept.
fn listed(namespace: &Namespace) -> Option<String> {
    if Command::new("nft").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "nft is needed in CI: apt-get install nftables");
        eprintln!("left out, nft is missing: apt-get install nftables");
        return None;
    }
    Some(namespace.run("nft list table inet penstock"))
}

#[test]
fn pain_9_a_dry_run_prints_what_nft_lists() {
    if !possible() {
        return;
    }
    let everything = ["--skip-subnets", "0.0.0.0/0,::/0"];
    let few = ["--skip-inbound-ports", "", "--skip-outbound-ports", "5432"];
    for options in [&[][..], &ALL_OPTIONS, &everything, &few] {
        let namespace = Namespace::new();
        let printed = done(&init(&namespace, &[options, &["--dry-run"]].concat()));
        assert!(
            !namespace.output("nft list table inet penstock").status.success(),
            "a dry run changes nothing"
        );
        done(&init(&namespace, options));
        let Some(listed) = listed(&namespace) else { return };
        assert_eq!(printed, listed, "{options:?}");
    }
}

#[test]
fn what_is_printed_can_be_given_to_nft() {
    if !possible() {
        return;
    }
    let namespace = Namespace::new();
    let printed = done(&init(&namespace, &[&ALL_OPTIONS[..], &["--dry-run"]].concat()));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules");
    std::fs::write(&file, &printed).unwrap();
    done(&init(&namespace, &[]));
    if listed(&namespace).is_none() {
        return;
    }
    done(&init(&namespace, &["--remove"]));
    namespace.run(&format!("nft -f {}", file.display()));
    assert_eq!(listed(&namespace).unwrap(), printed);
}

#[test]
fn rules_replace_their_older_version_and_go_without_a_trace() {
    if !possible() {
        return;
    }
    let namespace = Namespace::new();
    assert!(done(&init(&namespace, &["--remove"])).contains("nothing to remove"));
    for _ in 0..2 {
        done(&init(&namespace, &[]));
    }
    let Some(once) = listed(&namespace) else { return };
    namespace.run("nft add table inet other && nft add chain inet other theirs");
    namespace.run("nft add rule inet penstock outbound tcp dport 1 drop");
    done(&init(&namespace, &ALL_OPTIONS));
    assert!(!listed(&namespace).unwrap().contains("drop"), "the table is replaced, whoever has changed it");
    done(&init(&namespace, &[]));
    assert_eq!(listed(&namespace).unwrap(), once);
    for said in ["removed: ", "nothing to remove"] {
        assert!(done(&init(&namespace, &["--remove"])).contains(said), "{said}");
    }
    assert_eq!(namespace.run("nft list tables").trim(), "table inet other");
}

#[test]
fn pain_9_net_admin_is_all_that_it_needs() {
    let Some((_network, machine)) = machine() else { return };
    let namespace = &machine.namespace;
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("penstock-proxy");
    std::fs::copy(program("penstock-proxy"), &copy).unwrap();
    namespace.run(&format!("chmod 755 {}", folder.path().display()));
    let as_user = |capabilities: &str, args: &str| {
        namespace.output(&format!(
            "setpriv --reuid 1234 --regid 1234 --clear-groups --no-new-privs --inh-caps={capabilities} \
             --ambient-caps={capabilities} --bounding-set={capabilities} {} init {args}",
            copy.display()
        ))
    };
    let only = "-all,+net_admin";
    done(&as_user(only, ""));
    assert!(done(&as_user(only, "--check")).contains("inbound        ok"));
    done(&as_user(only, "--remove"));
    let refused = as_user("-all", "");
    assert_eq!(refused.status.code(), Some(1), "{}", says(&refused));
    assert!(says(&refused).contains("CAP_NET_ADMIN"), "{}", says(&refused));
    done(&as_user("-all", "--dry-run"));
}

/// A machine with routes, so that there is something to redirect.
fn machine() -> Option<(Network, Machine)> {
    let mut network = Network::new()?;
    let machine = network.machine();
    Some((network, machine))
}

#[test]
fn pain_9_a_check_tells_the_truth() {
    let Some((_network, machine)) = machine() else { return };
    let namespace = &machine.namespace;
    let failed = init(namespace, &["--check"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(says(&failed).contains("inbound        FAILED  there is no table"), "{}", says(&failed));
    assert!(says(&failed).contains("outbound IPv4  FAILED"), "{}", says(&failed));

    done(&init(namespace, &[]));
    let works = done(&init(namespace, &["--check"]));
    for line in [
        "outbound IPv4  ok      a connection to 192.0.2.1:80",
        "outbound IPv6  ok      a connection to [2001:db8:1::1]:80",
    ] {
        assert!(works.contains(line), "{works}");
    }
    assert!(works.contains("the kernel says where it was going"), "{works}");

    // The proxy has the port already.
    let taken = namespace.enter(|| {
        ["127.0.0.1:15001", "[::1]:15001"].map(|address| std::net::TcpListener::bind(address).unwrap())
    });
    assert_eq!(done(&init(namespace, &["--check"])).matches("at the proxy that listens there").count(), 2);
    // A connection that succeeds is not yet one that the proxy has.
    namespace.run("ip address add 192.0.2.1/32 dev lo");
    let _theirs = namespace.enter(|| std::net::TcpListener::bind("192.0.2.1:80").unwrap());
    let theirs = init(namespace, &["--check"]);
    assert_eq!(theirs.status.code(), Some(1));
    assert!(says(&theirs).contains("outbound IPv4  FAILED  somebody else"), "{}", says(&theirs));
    namespace.run("ip address del 192.0.2.1/32 dev lo");
    // A proxy that listens for one family only does not have the other's connections.
    let [four, six] = taken;
    drop(six);
    let half = init(namespace, &["--check"]);
    assert_eq!(half.status.code(), Some(1));
    assert!(says(&half).contains("outbound IPv6  FAILED  nobody listens at [::1]:15001"), "{}", says(&half));
    drop(four);

    // The proxy's own user is not redirected, and is told so.
    let own = init(namespace, &["--check", "--proxy-uid", "0"]);
    assert!(!own.status.success() && says(&own).contains("run it as another user"), "{}", says(&own));

    // Rules for one port; the check finds it if it is told of it.
    done(&init(namespace, &["--only-outbound-ports", "7777"]));
    let blind = init(namespace, &["--check"]);
    assert!(!blind.status.success() && says(&blind).contains("give the same"), "{}", says(&blind));
    assert!(done(&init(namespace, &["--check", "--only-outbound-ports", "7777"])).contains("192.0.2.1:7777"));
}

#[test]
fn pain_9_a_check_compares_what_the_rules_do_with_what_was_meant() {
    let Some((_network, machine)) = machine() else { return };
    let namespace = &machine.namespace;
    // Each rule of each kind is recognised as the kernel tells of it.
    for options in [&[][..], &ALL_OPTIONS, &["--skip-subnets", "::/0", "--skip-inbound-ports", "1-9,7"]] {
        done(&init(namespace, options));
        let checked = done(&init(namespace, &[options, &["--check"]].concat()));
        assert!(checked.contains("inbound        ok"), "{options:?}: {checked}");
    }
    for (laid, way, why) in [
        (&["--only-inbound-ports", "1"][..], "inbound        FAILED", "rule 3 of the chain inbound"),
        (&["--skip-inbound-ports", "8000"], "inbound        FAILED", "skip-inbound-ports"),
        (&["--skip-outbound-ports", "443,8080"], "outbound IPv4  FAILED", "rule 4 of the chain outbound"),
        (&["--proxy-uid", "4711"], "outbound IPv6  FAILED", "`meta skuid 2102 return"),
    ] {
        done(&init(namespace, laid));
        let checked = init(namespace, &["--check"]);
        assert_eq!(checked.status.code(), Some(1), "{laid:?}");
        let said = says(&checked);
        assert!(said.lines().any(|line| line.starts_with(way) && line.contains(why)), "{laid:?}: {said}");
    }
    done(&init(namespace, &[]));
    if listed(namespace).is_none() {
        return;
    }
    // The same words, and another effect.
    namespace.run("nft insert rule inet penstock inbound tcp dport 8000 return comment '\"inside the pod\"'");
    let changed = init(namespace, &["--check"]);
    assert!(!changed.status.success() && says(&changed).contains("rule 1 of"), "{}", says(&changed));
    done(&init(namespace, &[]));
    done(&init(namespace, &["--check"]));
    namespace.run("nft add table ip theirs");
    namespace.run("nft 'add chain ip theirs first { type nat hook prerouting priority -130; }'");
    namespace.run("nft add rule ip theirs first tcp dport 80 redirect to :81");
    let before = init(namespace, &["--check"]);
    assert_eq!(before.status.code(), Some(1));
    assert!(says(&before).contains("the chain first of the table ip theirs"), "{}", says(&before));
}

#[test]
fn without_a_default_route_a_neighbour_is_tried() {
    let Some((_network, machine)) = machine() else { return };
    let namespace = &machine.namespace;
    namespace.run("ip route del default; ip -6 route del default; true");
    done(&init(namespace, &[]));
    let works = done(&init(namespace, &["--check"]));
    for line in
        ["outbound IPv4  ok      a connection to 10.77.0.", "outbound IPv6  ok      a connection to [fd77"]
    {
        assert!(works.contains(line), "{works}");
    }
}

#[test]
fn a_proxy_that_would_meet_its_own_connections_does_not_start() {
    let all = ["--control=127.0.0.1:1", "--control-ca=none", "--token=none", "--node=a/b"];
    let start = |more: &[&str]| {
        Command::new(program("penstock-proxy")).arg("run").args(all).args(more).output().unwrap()
    };
    // Whoever runs the tests, he is one of these two at most.
    let refused = ["4711", "4712"].map(|user| start(&["--redirected", "--proxy-uid", user]));
    for refused in refused {
        let said = says(&refused);
        assert!(refused.status.code() == Some(1) && said.contains("come back to it without end"), "{said}");
    }
}

#[test]
fn without_ipv6_there_is_ipv4() {
    let Some((_network, machine)) = machine() else { return };
    machine.namespace.run("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6");
    done(&init(&machine.namespace, &[]));
    let works = done(&init(&machine.namespace, &["--check"]));
    assert!(works.contains("outbound IPv4  ok") && works.contains("outbound IPv6  none"), "{works}");
    assert!(works.contains("IPv6 is disabled here"), "{works}");
}

/// Where a connection arrives: at a listener that stands for the proxy, or nowhere.
fn arrives(machine: &Machine, to: SocketAddr) -> bool {
    let connect = || std::net::TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok();
    machine.namespace.enter(connect)
}

#[test]
fn pain_9_a_new_version_leaves_no_gap() {
    let Some((_network, machine)) = machine() else { return };
    let namespace = &machine.namespace;
    done(&init(namespace, &[]));
    let proxy = namespace.enter(|| std::net::TcpListener::bind("127.0.0.1:15001").unwrap());
    proxy.set_nonblocking(true).unwrap();
    let target = "192.0.2.9:80".parse().unwrap();
    let (done_with, missed, tried) = std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            for round in 0..40 {
                done(&init(namespace, if round % 2 == 0 { &ALL_OPTIONS[2..12] } else { &[] }));
            }
        });
        let (mut missed, mut tried) = (0, 0);
        while !changing.is_finished() {
            tried += 1;
            missed += u32::from(!arrives(&machine, target));
            while proxy.accept().is_ok() {}
        }
        (changing.join(), missed, tried)
    });
    done_with.unwrap();
    assert!(missed == 0 && tried > 40, "{missed} of {tried} connections were not redirected");
}

#[test]
fn what_is_skipped_is_not_redirected() {
    let Some((_network, machine)) = machine() else { return };
    let here = |port| SocketAddr::from((Network::HERE, port));
    let here_v6 = |port| SocketAddr::from((Network::HERE_V6, port));
    // Nobody stands for the proxy: what is redirected is refused, and what is not arrives here.
    let _listeners = [7001u16, 7002, 15020].map(|port| std::net::TcpListener::bind(("::", port)).unwrap());
    assert!(arrives(&machine, here(7001)) && arrives(&machine, here_v6(7001)));
    done(&init(&machine.namespace, &["--skip-outbound-ports", "7002-7003"]));
    assert!(!arrives(&machine, here(7001)) && !arrives(&machine, here_v6(7001)));
    assert!(arrives(&machine, here(7002)) && arrives(&machine, here_v6(7002)));
    assert!(arrives(&machine, here(15020)), "another sidecar's own port");
    done(&init(&machine.namespace, &["--skip-subnets", "10.77.0.0/24"]));
    assert!(arrives(&machine, here(7001)) && !arrives(&machine, here_v6(7001)));
    done(&init(&machine.namespace, &["--skip-subnets", "fd77::/16"]));
    assert!(!arrives(&machine, here(7001)) && arrives(&machine, here_v6(7001)));
    done(&init(&machine.namespace, &["--only-outbound-ports", "7002"]));
    assert!(arrives(&machine, here(7001)) && !arrives(&machine, here(7002)));

    // The way in.
    let into =
        |port| std::net::TcpStream::connect_timeout(&machine.at(port), Duration::from_millis(300)).is_ok();
    let into_v6 =
        |port| std::net::TcpStream::connect_timeout(&machine.at_v6(port), Duration::from_millis(300)).is_ok();
    let _application = machine
        .namespace
        .enter(|| [8000u16, 9090].map(|port| std::net::TcpListener::bind(("::", port)).unwrap()));
    assert!(!into(8000) && !into(9090) && !into_v6(9090));
    // Inside the pod, the application is reached at each of the pod's own addresses.
    assert!(arrives(&machine, machine.at(8000)) && arrives(&machine, machine.at_v6(8000)));
    assert!(arrives(&machine, "127.0.0.1:8000".parse().unwrap()));
    done(&init(&machine.namespace, &["--skip-inbound-ports", "9090"]));
    assert!(!into(8000) && !into_v6(8000) && into(9090) && into_v6(9090));
    done(&init(&machine.namespace, &["--remove"]));
    assert!(into(8000) && into_v6(8000));
}

#[test]
fn a_wrong_option_is_explained() {
    let said = |args: &[&str]| {
        let output =
            Command::new(program("penstock-proxy")).arg("init").args(args).arg("--dry-run").output().unwrap();
        assert!(!output.status.success());
        says(&output)
    };
    assert!(said(&["--skip-inbound-ports", "http"]).contains("write ports and ranges like 80,443,9000-9100"));
    assert!(said(&["--skip-subnets", "10.0.0.0/40"]).contains("write it like 10.0.0.0/8 or fd00::/8"));
    let run =
        |args: &[&str]| Command::new(program("penstock-proxy")).arg("init").args(args).output().unwrap();
    let many: Vec<_> = (1..=300).map(|host| format!("10.0.{}.{}", host / 256, host % 256)).collect();
    for wrong in [
        &["--skip-inbound-ports", "http"][..],
        &["--dry-run", "--skip-subnets", &many.join(",")],
        // Whose rules they are does not matter to what takes them away.
        &["--remove", "--skip-subnets", "10.0.0.0/8"],
        &["--remove", "--proxy-uid", "7"],
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", says(&output));
    }
}

#[test]
fn that_root_is_past_the_proxy_is_said() {
    if !possible() {
        return;
    }
    let namespace = Namespace::new();
    let laid = init(&namespace, &["--proxy-uid", "0"]);
    done(&laid);
    assert!(says(&laid).contains("whatever runs as root in this pod is past the proxy"), "{}", says(&laid));
    assert!(!says(&init(&namespace, &[])).contains("warning"));
}
