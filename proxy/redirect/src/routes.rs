//! What the kernel shows of this network namespace in `/proc/net`: its connections, and who its neighbours are.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::check::Family;

/// The calling thread's network namespace: the process's may be another one.
const OF_THIS: &str = "/proc/thread-self/net";

/// The TCP sockets here: own address, the other's.
pub(crate) fn connections() -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    let four = fs::read_to_string(format!("{OF_THIS}/tcp"))?;
    // Without IPv6 there is no such file.
    let six = fs::read_to_string(format!("{OF_THIS}/tcp6")).unwrap_or_default();
    Ok(four.lines().chain(six.lines()).filter_map(connection).collect())
}

fn connection(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let mut words = line.split_whitespace().skip(1);
    Some((socket(words.next()?)?, socket(words.next()?)?))
}

/// `0100007F:3A99`: words of an address as this machine holds them, and the port.
fn socket(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for at in 0..4 {
                octets[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Addresses that are reached from here without a gateway, and are not our own.
pub(crate) fn neighbours(family: Family) -> Vec<IpAddr> {
    let (file, read): (_, fn(&str) -> Option<IpAddr>) = match family {
        Family::V4 => ("route", neighbour_v4),
        Family::V6 => ("ipv6_route", neighbour_v6),
    };
    let routes = fs::read_to_string(format!("{OF_THIS}/{file}")).unwrap_or_default();
    let others = |address: IpAddr| [address, next(address)];
    routes.lines().filter_map(read).flat_map(others).filter(|address| is_elsewhere(*address)).collect()
}

/// The second address of a subnet: `Iface Destination Gateway Flags RefCnt Use Metric Mask …`. The first one is often a
/// gateway, which some answer for.
fn neighbour_v4(line: &str) -> Option<IpAddr> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [interface, destination, gateway, _, _, _, _, mask, ..] = words.as_slice() else { return None };
    let address = |text: &str| Some(Ipv4Addr::from(u32::from_str_radix(text, 16).ok()?.to_ne_bytes()));
    let whole = *interface != "lo" && address(gateway)?.is_unspecified();
    // Of a subnet that is smaller the second address is in the next one.
    let roomy = (8..=29).contains(&address(mask)?.to_bits().leading_ones());
    (whole && roomy).then_some(Ipv4Addr::from_bits(address(destination)?.to_bits() + 2).into())
}

/// The same: destination, its bits, source, its bits, gateway, metric, …, interface.
fn neighbour_v6(line: &str) -> Option<IpAddr> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [destination, bits, _, _, gateway, .., interface] = words.as_slice() else { return None };
    let address = |text: &str| Some(Ipv6Addr::from_bits(u128::from_str_radix(text, 16).ok()?));
    let destination = address(destination)?;
    let roomy = (8..=125).contains(&u8::from_str_radix(bits, 16).ok()?);
    // A link's own addresses need its name, and multicast is nobody's.
    let global = !destination.is_unicast_link_local() && !destination.is_multicast();
    let whole = *interface != "lo" && address(gateway)?.is_unspecified();
    (whole && roomy && global).then_some(Ipv6Addr::from_bits(destination.to_bits() + 2).into())
}

fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits().wrapping_add(1)).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits().wrapping_add(1)).into(),
    }
}

/// Whether a packet there would leave: the kernel chooses the route, and nothing is sent.
fn is_elsewhere(address: IpAddr) -> bool {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    from.is_ok_and(|from| from.ip() != address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn the_kernels_tables_are_read_as_it_writes_them() {
        let line = "   0: 0100007F:3A99 02004D0A:C001 01 00000000:00000000 00:00000000 00000000  2102 0 1";
        let read = connection(line).map(|(own, other)| (own.to_string(), other.to_string()));
        assert_eq!(read, Some(("127.0.0.1:15001".to_owned(), "10.77.0.2:49153".to_owned())));
        let six = "0: 00000000000000000000000001000000:3A99 0000000000000000FFFF00000100007F:0001 01";
        let read = connection(six).map(|(own, other)| (own.to_string(), other.to_string()));
        assert_eq!(read, Some(("[::1]:15001".to_owned(), "127.0.0.1:1".to_owned())));
        assert_eq!(connection("  sl  local_address rem_address   st tx_queue"), None);

        let v4 = |line| neighbour_v4(line).map(|address| address.to_string());
        assert_eq!(v4("eth0 00004D0A 00000000 0001 0 0 0 00FFFFFF 0 0 0").as_deref(), Some("10.77.0.2"));
        assert_eq!(v4("eth0 00000000 01004D0A 0003 0 0 0 00000000 0 0 0"), None, "the default route");
        assert_eq!(v4("eth0 05004D0A 00000000 0001 0 0 0 FFFFFFFF 0 0 0"), None, "one address");
        assert_eq!(v4("Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"), None);
        let any = "00000000000000000000000000000000";
        let v6 = |to: &str, bits: &str, interface: &str| {
            let line = format!("{to} {bits} {any} 00 {any} 00000100 00000001 00000000 00000001 {interface}");
            neighbour_v6(&line).map(|address| address.to_string())
        };
        let subnet = "fd770000000000000000000000000000";
        assert_eq!(v6(subnet, "40", "eth0").as_deref(), Some("fd77::2"));
        assert_eq!(v6(subnet, "80", "eth0"), None);
        assert_eq!(v6(subnet, "40", "lo"), None);
        assert_eq!(v6("fe800000000000000000000000000000", "40", "eth0"), None);
    }
}
