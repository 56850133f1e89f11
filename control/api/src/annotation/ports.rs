//! Sets of ports, and subnets: as people write them, and as the rules of a pod are made of them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::shown;

/// So many ranges of ports, and subnets. Each is a rule, and all rules travel in one datagram, which the kernel bounds: 212 KB by default.
pub const MOST: usize = 256;

/// A set of ports: sorted ranges that neither overlap nor touch, so that what means the same is the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// The set of these ranges.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Self {
        let mut sorted: Vec<_> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_by_key(|range| (*range.start(), *range.end()));
        let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
        for range in sorted {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Its ranges, in order.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a port is in it.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// All that are in one or the other.
    pub fn and(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).cloned())
    }
}

impl FromStr for Ports {
    type Err = String;

    /// `80,443,9000-9100`; the empty text is the empty set, as an annotation may be.
    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| match text.trim().parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("{} is no port; write ports and ranges like 80,443,9000-9100", shown(text))),
        };
        let mut ranges = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let range = match part.split_once('-') {
                Some((first, last)) => port(first)?..=port(last)?,
                None => port(part)?..=port(part)?,
            };
            if range.is_empty() {
                return Err(format!(
                    "{} ends before it begins; write {}-{}",
                    shown(part),
                    range.end(),
                    range.start()
                ));
            }
            ranges.push(range);
        }
        let ports = Self::new(ranges);
        match ports.0.len() {
            ..=MOST => Ok(ports),
            many => Err(format!("{many} separate ranges of ports, {MOST} is the limit; write wider ones")),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, range) in self.0.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            match range.start() == range.end() {
                true => write!(f, "{comma}{}", range.start())?,
                false => write!(f, "{comma}{}-{}", range.start(), range.end())?,
            }
        }
        Ok(())
    }
}

/// A subnet; the bits of the host are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subnet {
    address: IpAddr,
    bits: u8,
}

impl Subnet {
    /// The subnet around an address; `None` if the address has fewer bits.
    pub fn around(address: IpAddr, bits: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32u32.checked_sub(bits.into())?).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128u32.checked_sub(bits.into())?).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
            }
        };
        Some(Self { address, bits })
    }

    /// Its first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// How many leading bits are common to its addresses.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && Self::around(address, self.bits).is_some_and(|subnet| subnet == *self)
    }

    /// Whether it is one address.
    pub fn is_one(&self) -> bool {
        self.bits == if self.address.is_ipv4() { 32 } else { 128 }
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// `10.0.0.0/8`, `fd00::/8`, or an address alone.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{} is no subnet; write it like 10.0.0.0/8 or fd00::/8", shown(text));
        let (address, bits) = match text.trim().split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| wrong())?)),
            None => (text.trim(), None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        Self::around(address, bits.unwrap_or(whole)).ok_or_else(wrong)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(address) => write!(f, "{address}")?,
            // inet_ntop, and so nft, writes these as IPv4 in IPv6; Rust does not.
            IpAddr::V6(address) if address.segments()[..6] == [0; 6] && address.segments()[6] != 0 => {
                write!(f, "::{}", Ipv4Addr::from_bits(address.to_bits() as u32))?;
            }
            IpAddr::V6(address) => write!(f, "{address}")?,
        }
        if self.is_one() { Ok(()) } else { write!(f, "/{}", self.bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_are_read_as_people_write_them() {
        let shown = |text: &str| text.parse::<Ports>().map(|ports| ports.to_string());
        for (text, expected) in [
            ("", ""),
            (" , ", ""),
            ("80", "80"),
            ("443, 80", "80,443"),
            ("80,81,82", "80-82"),
            ("9000-9100,9050-9200,1", "1,9000-9200"),
            ("1-65535,80", "1-65535"),
            ("65535,65534", "65534-65535"),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["0", "65536", "http", "-80", "80-", "1-2-3", "80;81", "+80x"] {
            assert!(shown(text).unwrap_err().contains("80,443,9000-9100"), "{text}");
        }
        assert!(shown("90-80").unwrap_err().contains("80-90"));
        let many: Vec<_> = (1..=600u16).map(|port| (port * 2).to_string()).collect();
        assert!(shown(&many.join(",")).unwrap_err().contains("256"));
    }

    #[test]
    fn subnets_are_read_as_people_write_them() {
        let shown = |text: &str| text.parse::<Subnet>().map(|subnet| subnet.to_string());
        for (text, expected) in [
            ("10.1.2.3/8", "10.0.0.0/8"),
            (" 10.1.2.3 ", "10.1.2.3"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("10.1.2.3/0", "0.0.0.0/0"),
            ("fd12:3456::1/8", "fd00::/8"),
            ("::1", "::1"),
            ("::1/0", "::/0"),
            ("::1.2.3.4", "::1.2.3.4"),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["", "10.0.0.0/33", "fd00::/129", "10.0.0.0/", "10.0.0/8", "example.com", "10.0.0.0/-1"] {
            assert!(shown(text).unwrap_err().contains("10.0.0.0/8 or fd00::/8"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_set_has_exactly_the_ports_that_were_written(
            written in prop::collection::vec((1u16.., 0u16..300), 0..12),
            asked in 1u16..,
        ) {
            let ranges: Vec<_> =
                written.iter().map(|(first, more)| *first..=first.saturating_add(*more)).collect();
            let text: Vec<_> =
                ranges.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect();
            let ports: Ports = text.join(",").parse().unwrap();
            let candidates = ranges.iter().flat_map(|range| {
                [range.start().saturating_sub(1), *range.start(), *range.end(), range.end().saturating_add(1)]
            });
            for port in candidates.chain([asked]) {
                prop_assert_eq!(ports.contains(port), ranges.iter().any(|range| range.contains(&port)));
            }
            prop_assert!(ports.ranges().windows(2).all(|two| two[0].end() + 1 < *two[1].start()));
            prop_assert_eq!(ports.to_string().parse::<Ports>(), Ok(ports));
        }

        #[test]
        fn whatever_is_written_is_read_or_refused(text in "[0-9,. /:a-f-]{0,24}") {
            if let Ok(ports) = text.parse::<Ports>() {
                prop_assert_eq!(ports.to_string().parse::<Ports>(), Ok(ports));
            }
            if let Ok(subnet) = text.parse::<Subnet>() {
                prop_assert_eq!(subnet.to_string().parse::<Subnet>(), Ok(subnet));
            }
        }

        #[test]
        fn a_subnet_has_exactly_the_addresses_with_its_leading_bits(address: u128, other: u128, bits in 0u8..=128) {
            let subnet = Subnet::around(Ipv6Addr::from_bits(address).into(), bits).unwrap();
            let flipped = |bit: u8| Ipv6Addr::from_bits(address ^ (1u128 << (127 - bit))).into();
            prop_assert!(subnet.contains(Ipv6Addr::from_bits(address).into()));
            prop_assert!(bits == 0 || !subnet.contains(flipped(bits - 1)));
            prop_assert!(bits == 128 || subnet.contains(flipped(bits)));
            let common = (address ^ other).leading_zeros() >= bits.into();
            prop_assert_eq!(subnet.contains(Ipv6Addr::from_bits(other).into()), common);
            prop_assert!(!subnet.contains(Ipv4Addr::LOCALHOST.into()));
        }
    }
}
