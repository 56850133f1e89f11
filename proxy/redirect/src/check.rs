//! Does it work? Connections are made as an application would make them, and it is seen where they arrive.
//!
//! Each family's connection goes to an address that exists nowhere (RFC 5737, RFC 3849), or, where no route leads
//! there, to a neighbour. If the rules work, it arrives at the proxy's outbound port all the same: at a listener of our
//! own, which also asks the kernel where the connection was going, or, if the proxy has that port already, at the proxy,
//! whose end of it the kernel shows. The way in cannot be tried from inside: what begins in a network namespace never
//! passes `prerouting`. Therefore, and since one connection does not stand for all, the rules that are in force are also
//! compared with those that the options mean, and nobody else's may decide before them.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use penstock_api::names::port;
use socket2::SockRef;

use crate::kernel::{self, Problem};
use crate::laid::Laid;
use crate::options::Options;
use crate::ruleset::{Connection, Fate, Hook, Ruleset};
use crate::{message, routes};

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
    let listeners = [Family::V4, Family::V6].map(|family| (family, Listener::take(family)));
    let proxy_at = |family: Family| {
        let mut others = listeners.iter().filter(|(other, _)| *other != family);
        others.any(|(_, listener)| matches!(listener, Listener::Proxy))
    };
    let try_family = |(family, listener): &(Family, Listener)| {
        let answer = match listener {
            Listener::Ours(_) if proxy_at(*family) => Answer::Fails(format!(
                "nobody listens at {}, where these connections are led, and a proxy does for the other family",
                family.outbound()
            )),
            _ => outbound(options, &ruleset, *family, listener, uid),
        };
        // That one connection arrived does not say that all do, nor that none was tried that all would.
        let answer = match (answer, wrong(&laid, &ruleset, Hook::Output, &[family.number()])) {
            (Answer::Works(_) | Answer::Nothing(_), Some(why)) => Answer::Fails(why),
            (answer, _) => answer,
        };
        (*family, answer)
    };
    Ok(Checked { outbound: listeners.iter().map(try_family).collect(), inbound: inbound(&laid, &ruleset) })
}

/// Why the rules of one way are not those that were meant.
fn wrong(laid: &Laid, ruleset: &Ruleset, hook: Hook, families: &[u8]) -> Option<String> {
    let differs = laid.differs(ruleset, hook).map(|why| {
        format!("{why}; give the check the options that the rules were laid with, or lay them anew: penstock-proxy init")
    });
    differs.or_else(|| laid.before_ours(hook, families))
}

fn inbound(laid: &Laid, ruleset: &Ruleset) -> Answer {
    if laid.rules.is_empty() {
        return Answer::Fails(
            "there is no table inet penstock in this network namespace; lay it: penstock-proxy init".into(),
        );
    }
    match wrong(laid, ruleset, Hook::Prerouting, &[Family::V4.number(), Family::V6.number()]) {
        Some(why) => Answer::Fails(why),
        None => Answer::Works(format!(
            "the rules in force are those of these options, {} in all (only a connection from elsewhere can try them)",
            laid.rules.len()
        )),
    }
}

/// Who takes what is redirected.
enum Listener {
    /// We do: nobody else was there.
    Ours(TcpListener),
    /// Somebody who listens there, who should be the proxy.
    Proxy,
    /// Nobody can: the family is disabled.
    Disabled(io::Error),
}

impl Listener {
    fn take(family: Family) -> Self {
        match TcpListener::bind(family.outbound()) {
            Ok(listener) => Self::Ours(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => Self::Proxy,
            Err(error) => Self::Disabled(error),
        }
    }
}

impl Family {
    /// Where connections of the application are led.
    fn outbound(self) -> SocketAddr {
        let loopback: IpAddr = match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        SocketAddr::new(loopback, port::OUTBOUND)
    }

    fn number(self) -> u8 {
        match self {
            Self::V4 => message::NFPROTO_IPV4,
            Self::V6 => message::NFPROTO_IPV6,
        }
    }
}

fn outbound(options: &Options, ruleset: &Ruleset, family: Family, listener: &Listener, uid: u32) -> Answer {
    if uid == options.proxy_uid {
        return Answer::Fails(format!(
            "this runs as user {uid}, which is the proxy's, and the rules let that one pass; run it as another user"
        ));
    }
    if let Listener::Disabled(error) = listener {
        return Answer::Nothing(format!("{family} is disabled here ({}: {error})", family.outbound().ip()));
    }
    let nowhere = match family {
        Family::V4 => {
            [[192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1]].map(|octets| Ipv4Addr::from(octets).into())
        }
        Family::V6 => [[0xdb8, 1], [0xdb8, 2], [0xdb8, 3]]
            .map(|[net, host]| Ipv6Addr::new(0x2001, net, host, 0, 0, 0, 0, 1).into()),
    };
    let Some(target) = target(options, ruleset, &nowhere, uid) else {
        return Answer::Nothing("the options leave nothing that would be redirected".into());
    };
    let (target, client) = match TcpStream::connect_timeout(&target, PATIENCE) {
        Ok(client) => (target, client),
        Err(error) if no_route(&error) => {
            // Without a route to elsewhere there may still be neighbours.
            let neighbours = routes::neighbours(family);
            let Some(target) = self::target(options, ruleset, &neighbours, uid) else {
                return Answer::Nothing(format!("no route leads out of here over {family}"));
            };
            match TcpStream::connect_timeout(&target, PATIENCE) {
                Ok(client) => (target, client),
                Err(error) => return missed(target, &error),
            }
        }
        Err(error) => return missed(target, &error),
    };
    let place = family.outbound();
    let arrived = match listener {
        Listener::Ours(listener) => arrived(listener, &client, target),
        _ => at_the_proxy(place, &client),
    };
    match (arrived, listener) {
        (Ok(()), Listener::Ours(_)) => Answer::Works(format!(
            "a connection to {target} arrived at {place}, and the kernel says where it was going"
        )),
        (Ok(()), _) => Answer::Works(format!(
            "a connection to {target} arrived at {place}, at the proxy that listens there"
        )),
        (Err(error), _) => {
            Answer::Fails(format!("somebody else than {place} took a connection to {target}: {error}"))
        }
    }
}

fn no_route(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable)
}

fn missed(target: SocketAddr, error: &io::Error) -> Answer {
    Answer::Fails(format!(
        "a connection to {target} was not redirected ({error}); if the rules were laid with options, give the same to \
         the check"
    ))
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

/// Looks for the proxy's end of our connection among this network namespace's.
fn at_the_proxy(place: SocketAddr, client: &TcpStream) -> io::Result<()> {
    let from = client.local_addr()?;
    match routes::connections()?.contains(&(place, from)) {
        true => Ok(()),
        false => Err(io::Error::other("the kernel knows no such connection there")),
    }
}

/// One of these addresses, with a port, that the rules redirect.
fn target(options: &Options, ruleset: &Ruleset, addresses: &[IpAddr], uid: u32) -> Option<SocketAddr> {
    let only = options.only_outbound.ranges().iter().flat_map(|range| [*range.start(), *range.end()]);
    let ports: Vec<u16> = [80, 443, 8000, 8080, 5432].into_iter().chain(only).chain(1024..2048).collect();
    let mut all = addresses.iter().flat_map(|ip| ports.iter().map(|port| SocketAddr::new(*ip, *port)));
    all.find(|to| {
        let connection = Connection { from_elsewhere: false, uid, stays_here: false, to: *to };
        ruleset.fate(&connection) == Fate::Redirected(port::OUTBOUND)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laid::tests::laid;

    #[test]
    fn a_target_is_one_that_the_rules_redirect() {
        let addresses: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap()];
        let found = |options: &Options| {
            target(options, &Ruleset::new(options), &addresses, 0).map(|to| to.to_string())
        };
        assert_eq!(found(&Options::default()).as_deref(), Some("192.0.2.1:80"));
        let skip = Options {
            skip_outbound: "1-500".parse().unwrap(),
            skip_subnets: vec!["192.0.0.0/8".parse().unwrap()],
            ..Options::default()
        };
        assert_eq!(found(&skip).as_deref(), Some("198.51.100.1:8000"));
        let only = Options { only_outbound: "7777".parse().unwrap(), ..Options::default() };
        assert_eq!(found(&only).as_deref(), Some("192.0.2.1:7777"));
        let none = Options { skip_subnets: vec!["0.0.0.0/0".parse().unwrap()], ..Options::default() };
        assert_eq!(found(&none), None);
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
        let meant = Ruleset::new(&Options::default());
        assert!(matches!(inbound(&Laid::default(), &meant), Answer::Fails(why) if why.contains("no table")));
        assert!(matches!(inbound(&laid(&meant), &meant), Answer::Works(_)));
        let other = Ruleset::new(&Options { only_inbound: "1".parse().unwrap(), ..Options::default() });
        assert!(matches!(inbound(&laid(&other), &meant), Answer::Fails(why) if why.contains("anew")));
    }
}
