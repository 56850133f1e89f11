//! Does it work? Connections are made as an application would make them, and it is seen where they arrive.
//!
//! Each family's connection goes to an address that exists nowhere (RFC 5737, RFC 3849). If the rules work, it arrives
//! at the proxy's outbound port all the same: at a listener of our own, which also asks the kernel where the
//! connection was going, or, if the proxy has that port already, at the proxy. The way in cannot be tried from
//! inside: what begins in a network namespace never passes `prerouting`. Of it is checked that its rules are in force.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::SockRef;

use crate::kernel::{self, Problem};
use crate::options::Options;
use crate::ruleset::{Connection, Fate, Ruleset};

/// A redirected connection stays on this machine; one that is not goes nowhere.
const PATIENCE: Duration = Duration::from_secs(2);

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What became of a family's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It arrived; the text says how that is known.
    Works(String),
    /// There is nothing to redirect, because of this.
    Nothing(String),
    /// It did not arrive, because of this.
    Fails(String),
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Of each family, from the application outwards.
    pub outbound: Vec<(Family, Answer)>,
    /// The rules for what comes in.
    pub inbound: Answer,
}

impl Checked {
    /// Whether the pod's traffic goes where it should.
    pub fn works(&self) -> bool {
        let answers = || self.outbound.iter().map(|(_, answer)| answer);
        answers().any(|answer| matches!(answer, Answer::Works(_)))
            && answers().chain([&self.inbound]).all(|answer| !matches!(answer, Answer::Fails(_)))
    }
}

/// Tries it. `uid` is the user whose connections these are: ours.
pub fn check(options: &Options, uid: u32) -> Result<Checked, Problem> {
    let laid = kernel::laid()?;
    let ruleset = Ruleset::new(options);
    let try_family = |family| (family, outbound(options, &ruleset, family, uid));
    let checked =
        Checked { outbound: [Family::V4, Family::V6].map(try_family).into(), inbound: inbound(&laid) };
    Ok(checked)
}

fn inbound(laid: &[(String, String)]) -> Answer {
    let has =
        |chain: &str, words: &str| laid.iter().any(|(of, comment)| of == chain && comment.starts_with(words));
    if laid.is_empty() {
        Answer::Fails(
            "there is no table inet penstock in this network namespace; lay it: penstock-proxy init".into(),
        )
    } else if has("inbound", "to the proxy") && has("outbound", "to the proxy") {
        Answer::Works(format!(
            "the rules are in force, {} in all (only a connection from elsewhere can try them)",
            laid.len()
        ))
    } else {
        Answer::Fails(
            "the table inet penstock has other rules than ours; lay it anew: penstock-proxy init".into(),
        )
    }
}

fn outbound(options: &Options, ruleset: &Ruleset, family: Family, uid: u32) -> Answer {
    if uid == options.proxy_uid {
        return Answer::Fails(format!(
            "this runs as user {uid}, which is the proxy's, and the rules let that one pass; run it as another user"
        ));
    }
    let Some(target) = target(options, ruleset, family, uid) else {
        return Answer::Nothing("the options leave nothing that would be redirected".into());
    };
    let loopback: IpAddr = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    let listener = match TcpListener::bind(SocketAddr::new(loopback, options.outbound)) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        Err(error) => return Answer::Nothing(format!("{family} is disabled here ({loopback}: {error})")),
    };
    let client = match TcpStream::connect_timeout(&target, PATIENCE) {
        Ok(client) => client,
        Err(error) => return missed(family, target, &error),
    };
    let Some(listener) = listener else {
        return Answer::Works(format!(
            "a connection to {target}, which exists nowhere, was taken on port {} by the proxy that listens there",
            options.outbound
        ));
    };
    match arrived(&listener, &client, target) {
        Ok(()) => Answer::Works(format!(
            "a connection to {target}, which exists nowhere, arrived on port {}, and the kernel says where it was going",
            options.outbound
        )),
        Err(error) => Answer::Fails(format!("somebody else took a connection to {target}: {error}")),
    }
}

fn missed(family: Family, target: SocketAddr, error: &io::Error) -> Answer {
    match error.kind() {
        ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable => {
            Answer::Nothing(format!("no route leads out of here over {family}"))
        }
        _ => Answer::Fails(format!(
            "a connection to {target} was not redirected ({error}); if the rules were laid with options, give the same \
             to the check"
        )),
    }
}

/// Waits for our own connection among those that arrive, and asks where it was going.
fn arrived(listener: &TcpListener, client: &TcpStream, target: SocketAddr) -> io::Result<()> {
    SockRef::from(listener).set_read_timeout(Some(PATIENCE))?;
    loop {
        let (server, peer) = listener.accept()?;
        if peer != client.local_addr()? {
            continue;
        }
        let socket = SockRef::from(&server);
        let original = if target.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
        return match original?.as_socket() {
            Some(original) if original == target => Ok(()),
            other => Err(io::Error::other(format!("it arrived as one for {other:?}"))),
        };
    }
}

/// An address that exists nowhere and that the rules redirect.
fn target(options: &Options, ruleset: &Ruleset, family: Family, uid: u32) -> Option<SocketAddr> {
    let addresses: [IpAddr; 3] = match family {
        Family::V4 => {
            [[192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1]].map(|octets| Ipv4Addr::from(octets).into())
        }
        Family::V6 => [[0xdb8, 1], [0xdb8, 2], [0xdb8, 3]]
            .map(|[net, host]| Ipv6Addr::new(0x2001, net, host, 0, 0, 0, 0, 1).into()),
    };
    let only = options.only_outbound.ranges().iter().flat_map(|range| [*range.start(), *range.end()]);
    let ports: Vec<u16> = [80, 443, 8000, 8080, 5432].into_iter().chain(only).chain(1024..2048).collect();
    let all = addresses.iter().flat_map(|ip| ports.iter().map(|port| SocketAddr::new(*ip, *port)));
    all.into_iter().find(|to| {
        let connection = Connection { from_elsewhere: false, uid, stays_here: false, to: *to };
        ruleset.fate(&connection) == Fate::Redirected(options.outbound)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_one_that_the_rules_redirect() {
        let found = |options: &Options, family| target(options, &Ruleset::new(options), family, 0);
        let ask = |options: &Options| {
            [Family::V4, Family::V6].map(|family| found(options, family).map(|to| to.to_string()))
        };
        let some = |v4: &str, v6: &str| [Some(v4.to_owned()), Some(v6.to_owned())];
        assert_eq!(ask(&Options::default()), some("192.0.2.1:80", "[2001:db8:1::1]:80"));
        let skip = Options {
            skip_outbound: "1-500".parse().unwrap(),
            skip_subnets: vec!["192.0.0.0/8".parse().unwrap()],
            ..Options::default()
        };
        assert_eq!(ask(&skip), some("198.51.100.1:8000", "[2001:db8:1::1]:8000"));
        let only = Options { only_outbound: "7777".parse().unwrap(), ..Options::default() };
        assert_eq!(ask(&only), some("192.0.2.1:7777", "[2001:db8:1::1]:7777"));
        let none = Options { skip_subnets: vec!["::/0".parse().unwrap()], ..Options::default() };
        assert_eq!(found(&none, Family::V6), None);
    }

    #[test]
    fn one_family_that_fails_is_a_failure_and_none_that_works_is_too() {
        let (works, nothing, fails) =
            (Answer::Works(String::new()), Answer::Nothing(String::new()), Answer::Fails(String::new()));
        let verdict = |v4: &Answer, v6: &Answer, inbound: &Answer| {
            let outbound = vec![(Family::V4, v4.clone()), (Family::V6, v6.clone())];
            Checked { outbound, inbound: inbound.clone() }.works()
        };
        assert!(verdict(&works, &works, &works) && verdict(&works, &nothing, &works));
        assert!(!verdict(&works, &fails, &works) && !verdict(&nothing, &nothing, &works));
        assert!(!verdict(&works, &works, &fails));
    }

    #[test]
    fn rules_that_are_not_ours_are_told_from_none() {
        let said = |laid: &[(&str, &str)]| {
            let laid: Vec<_> = laid.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            inbound(&laid)
        };
        assert!(matches!(said(&[]), Answer::Fails(why) if why.contains("no table")));
        assert!(matches!(said(&[("inbound", "x")]), Answer::Fails(why) if why.contains("other rules")));
        let ours: Vec<_> = Ruleset::new(&Options::default())
            .chains
            .iter()
            .flat_map(|chain| chain.rules.iter().map(|rule| (chain.name, rule.comment)))
            .collect();
        assert!(matches!(said(&ours), Answer::Works(_)));
    }
}
