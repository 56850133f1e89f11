//! The rules, as data: what the kernel is told and what a reader is shown come from the same value.
//!
//! ```text
//!   from elsewhere ──▶ chain inbound ───▶ 15006, the proxy, which connects to the application
//!   the application ─▶ chain outbound ──▶ 15001, the proxy, which connects to wherever it was going
//! ```
//!
//! What the proxy itself begins is never redirected. When it chooses its own pod among a Service's endpoints, it
//! therefore has to connect to its own inbound port, and it does (`proxy/src/send/connect.rs`).
//!
//! Rules are tried in their order, and only for the first packet of a connection: a rule for each range costs nothing
//! that could be measured, and everybody can read it, which cannot be said of sets and maps.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use penstock_api::names::port;

use crate::TABLE;
use crate::options::{Options, Ports, Subnet};

/// Where the kernel asks a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// For what comes from elsewhere.
    Prerouting,
    /// For what begins in this network namespace.
    Output,
}

/// The chains' priority: before `dstnat` (-100), so that nobody's rules there decide first, and after the beginning of
/// connection tracking (-200), which the kernel demands. It is also one that every version of nft shows as a number.
pub(crate) const PRIORITY: i32 = -120;

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// It came in, or goes out, over the loopback interface, as everything does whose destination is an address of
    /// this network namespace.
    StaysHere(Hook),
    /// The socket belongs to this user.
    User(u32),
    /// It is TCP.
    Tcp,
    /// It is TCP, to one of these ports.
    Port(RangeInclusive<u16>),
    /// Its destination is in the subnet.
    To(Subnet),
}

/// What happens if all conditions of a rule hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to where it was going.
    Return,
    /// To this port of ours.
    Redirect(u16),
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Conditions, all of which must hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub verdict: Verdict,
    /// Why; it is shown by `nft list` too.
    pub comment: &'static str,
}

/// Rules in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Who asks it.
    pub hook: Hook,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// All rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// The chains, one for each way.
    pub chains: Vec<Chain>,
}

impl Ruleset {
    /// The rules that these options mean.
    pub fn new(options: &Options) -> Self {
        let own = Options::own_ports();
        let past = |matches, comment| Rule { matches, verdict: Verdict::Return, comment };
        let inbound = [
            vec![past(vec![Match::StaysHere(Hook::Prerouting)], "inside the pod")],
            ports(&own, &Verdict::Return, "the sidecar's own ports"),
            ports(&options.skip_inbound, &Verdict::Return, "skip-inbound-ports"),
            redirect(&options.only_inbound, port::INBOUND, "to the proxy, for the application"),
        ]
        .concat();
        let mut rules = Vec::new();
        rules.push(past(vec![Match::User(options.proxy_uid)], "the proxy itself"));
        rules.push(past(vec![Match::StaysHere(Hook::Output)], "inside the pod"));
        rules.extend(ports(&own, &Verdict::Return, "other sidecars' own ports"));
        rules.extend(ports(&options.skip_outbound, &Verdict::Return, "skip-outbound-ports"));
        let mut subnets = options.skip_subnets.clone();
        subnets.sort();
        subnets.dedup();
        rules.extend(subnets.into_iter().map(|subnet| past(vec![Match::To(subnet)], "skip-subnets")));
        rules.extend(redirect(&options.only_outbound, port::OUTBOUND, "to the proxy, from the application"));
        let chains = vec![
            Chain { name: "inbound", hook: Hook::Prerouting, rules: inbound },
            Chain { name: "outbound", hook: Hook::Output, rules },
        ];
        Self { chains }
    }

    /// What becomes of a connection.
    pub fn fate(&self, connection: &Connection) -> Fate {
        let hook = if connection.from_elsewhere { Hook::Prerouting } else { Hook::Output };
        let mut rules = self.chains.iter().filter(|chain| chain.hook == hook).flat_map(|chain| &chain.rules);
        match rules.find(|rule| rule.matches.iter().all(|condition| condition.holds(connection))) {
            Some(Rule { verdict: Verdict::Redirect(port), .. }) => Fate::Redirected(*port),
            _ => Fate::Untouched,
        }
    }
}

/// A TCP connection that begins.
#[derive(Clone, Debug)]
pub struct Connection {
    /// It comes from elsewhere, rather than from this network namespace.
    pub from_elsewhere: bool,
    /// The user whose socket it is, if it begins here.
    pub uid: u32,
    /// It goes from this network namespace to an address of it.
    pub stays_here: bool,
    /// Its destination.
    pub to: SocketAddr,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes to this port of ours.
    Redirected(u16),
    /// It goes where it was going.
    Untouched,
}

impl Match {
    fn holds(&self, connection: &Connection) -> bool {
        match self {
            Self::StaysHere(_) => connection.stays_here,
            Self::User(uid) => connection.uid == *uid,
            Self::Tcp => true,
            Self::Port(range) => range.contains(&connection.to.port()),
            Self::To(subnet) => subnet.contains(connection.to.ip()),
        }
    }
}

fn ports(ports: &Ports, verdict: &Verdict, comment: &'static str) -> Vec<Rule> {
    let rule = |range: &RangeInclusive<u16>| Rule {
        matches: vec![Match::Port(range.clone())],
        verdict: verdict.clone(),
        comment,
    };
    ports.ranges().iter().map(rule).collect()
}

fn redirect(only: &Ports, to: u16, comment: &'static str) -> Vec<Rule> {
    let verdict = Verdict::Redirect(to);
    match only.is_empty() {
        true => vec![Rule { matches: vec![Match::Tcp], verdict, comment }],
        false => ports(only, &verdict, comment),
    }
}

/// As `nft list table inet penstock` shows it.
impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table inet {TABLE} {{")?;
        for (number, chain) in self.chains.iter().enumerate() {
            writeln!(f, "{}\tchain {} {{", if number == 0 { "\n" } else { "\n\n" }, chain.name)?;
            let hook = match chain.hook {
                Hook::Prerouting => "prerouting",
                Hook::Output => "output",
            };
            writeln!(f, "\t\ttype nat hook {hook} priority {PRIORITY}; policy accept;")?;
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            write!(f, "\t}}")?;
        }
        write!(f, "\n}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        match &self.verdict {
            Verdict::Return => write!(f, "return")?,
            Verdict::Redirect(port) => write!(f, "redirect to :{port}")?,
        }
        write!(f, " comment \"{}\"", self.comment)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = |subnet: &Subnet| if subnet.address().is_ipv4() { "ip" } else { "ip6" };
        match self {
            Self::StaysHere(Hook::Prerouting) => write!(f, "iifname \"lo\""),
            Self::StaysHere(Hook::Output) => write!(f, "oifname \"lo\""),
            Self::User(uid) => write!(f, "meta skuid {uid}"),
            Self::Tcp => write!(f, "meta l4proto tcp"),
            Self::Port(range) if range.start() == range.end() => write!(f, "tcp dport {}", range.start()),
            Self::Port(range) => write!(f, "tcp dport {}-{}", range.start(), range.end()),
            Self::To(subnet) if subnet.bits() == 0 => {
                write!(f, "meta nfproto {}", if subnet.address().is_ipv4() { "ipv4" } else { "ipv6" })
            }
            Self::To(subnet) => write!(f, "{} daddr {subnet}", family(subnet)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn from_application(to: &str) -> Connection {
        Connection { from_elsewhere: false, uid: 1000, stays_here: false, to: to.parse().unwrap() }
    }

    fn from_elsewhere(to: &str) -> Connection {
        Connection { from_elsewhere: true, uid: 0, ..from_application(to) }
    }

    #[test]
    fn what_is_redirected_and_what_is_not() {
        let options = Options {
            skip_inbound: "9090".parse().unwrap(),
            skip_outbound: "25,6000-6100".parse().unwrap(),
            skip_subnets: vec!["10.9.0.0/16".parse().unwrap(), "fd09::/16".parse().unwrap()],
            ..Options::default()
        };
        let rules = Ruleset::new(&options);
        let proxy = |to| Connection { uid: 2102, ..from_application(to) };
        let here = |connection| Connection { stays_here: true, ..connection };
        let (inbound, outbound) = (Fate::Redirected(15006), Fate::Redirected(15001));
        for (connection, expected) in [
            (from_application("10.1.2.3:80"), outbound),
            (from_application("[fd00::1]:80"), outbound),
            (from_application("10.1.2.3:6050"), Fate::Untouched),
            (from_application("10.9.2.3:80"), Fate::Untouched),
            (from_application("[fd09::1]:80"), Fate::Untouched),
            (from_application("10.1.2.3:15020"), Fate::Untouched),
            (here(from_application("127.0.0.1:80")), Fate::Untouched),
            (here(from_application("10.0.0.2:80")), Fate::Untouched),
            (proxy("10.1.2.3:80"), Fate::Untouched),
            (here(proxy("127.0.0.1:8000")), Fate::Untouched),
            (here(proxy("[::1]:8000")), Fate::Untouched),
            (here(proxy("10.0.0.2:8000")), Fate::Untouched),
            (here(proxy("[fd00::2]:8000")), Fate::Untouched),
            (here(proxy("10.0.0.2:9090")), Fate::Untouched),
            (from_elsewhere("10.0.0.2:8000"), inbound),
            (from_elsewhere("[fd00::2]:25"), inbound),
            (from_elsewhere("10.0.0.2:9090"), Fate::Untouched),
            (from_elsewhere("10.0.0.2:15006"), Fate::Untouched),
            (from_elsewhere("10.0.0.2:15001"), Fate::Untouched),
        ] {
            assert_eq!(rules.fate(&connection), expected, "{connection:?}\n{rules}");
        }
    }

    #[test]
    fn the_text_teaches() {
        let only = Options {
            only_inbound: "8000".parse().unwrap(),
            skip_subnets: vec!["0.0.0.0/0".parse().unwrap()],
            ..Options::default()
        };
        let expected = r#"table inet penstock {
	chain inbound {
		type nat hook prerouting priority -120; policy accept;
		iifname "lo" return comment "inside the pod"
		tcp dport 15000-15020 return comment "the sidecar's own ports"
		tcp dport 8000 redirect to :15006 comment "to the proxy, for the application"
	}

	chain outbound {
		type nat hook output priority -120; policy accept;
		meta skuid 2102 return comment "the proxy itself"
		oifname "lo" return comment "inside the pod"
		tcp dport 15000-15020 return comment "other sidecars' own ports"
		meta nfproto ipv4 return comment "skip-subnets"
		meta l4proto tcp redirect to :15001 comment "to the proxy, from the application"
	}
}"#;
        assert_eq!(Ruleset::new(&only).to_string(), expected);
    }

    fn some_ports() -> impl Strategy<Value = Ports> {
        let range = (1u16.., 0u16..2000).prop_map(|(first, more)| first..=first.saturating_add(more));
        prop::collection::vec(range, 0..6).prop_map(Ports::new)
    }

    proptest! {
        #[test]
        fn a_port_is_skipped_if_an_option_says_so_and_only_then(
            skip_inbound in some_ports(),
            skip_outbound in some_ports(),
            only_inbound in some_ports(),
            only_outbound in some_ports(),
            port in prop_oneof![1u16.., 14990u16..15030],
            six: bool,
        ) {
            let options =
                Options { skip_inbound, skip_outbound, only_inbound, only_outbound, ..Options::default() };
            let rules = Ruleset::new(&options);
            let to = if six { format!("[fd00::1]:{port}") } else { format!("10.0.0.1:{port}") };
            let expected = |skip: &Ports, only: &Ports, to| {
                let past = (15000..=15020).contains(&port) || skip.contains(port);
                let redirected = !past && (only.is_empty() || only.contains(port));
                if redirected { Fate::Redirected(to) } else { Fate::Untouched }
            };
            prop_assert_eq!(
                rules.fate(&from_application(&to)),
                expected(&options.skip_outbound, &options.only_outbound, 15001)
            );
            prop_assert_eq!(
                rules.fate(&from_elsewhere(&to)),
                expected(&options.skip_inbound, &options.only_inbound, 15006)
            );
            let proxy = Connection { uid: 2102, ..from_application(&to) };
            prop_assert_eq!(rules.fate(&proxy), Fate::Untouched, "the proxy would go round in circles");
        }
    }
}
