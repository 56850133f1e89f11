//! What a user may choose of the rules. Ports and subnets are read as the annotations of a pod are, which say the same.

use penstock_api::annotation::MOST;
pub use penstock_api::annotation::{Ports, Subnet};
use penstock_api::names::{self, port};

/// What is redirected and what is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Connections of this user are the proxy's own.
    pub proxy_uid: u32,
    /// Ports of the application that are reached past the proxy.
    pub skip_inbound: Ports,
    /// Ports elsewhere that the application reaches past the proxy.
    pub skip_outbound: Ports,
    /// If it is not empty, nothing but these ports of the application is redirected.
    pub only_inbound: Ports,
    /// If it is not empty, nothing but connections to these ports elsewhere is redirected.
    pub only_outbound: Ports,
    /// Where the application goes past the proxy. Of destinations only: a source address proves nothing, so nobody
    /// gets past the inbound proxy for having one.
    pub skip_subnets: Vec<Subnet>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            proxy_uid: names::PROXY_UID,
            skip_inbound: Ports::default(),
            skip_outbound: Ports::default(),
            only_inbound: Ports::default(),
            only_outbound: Ports::default(),
            skip_subnets: Vec::new(),
        }
    }
}

impl Options {
    /// The ports of sidecars, which nothing redirects, in this pod or another. They are the same in all pods: a port
    /// that one pod chose for its proxy would be an application's in the next, and lead past the mesh there.
    pub fn own_ports() -> Ports {
        Ports::new([port::ADMIN..=port::HEALTH])
    }

    /// Whether they can be a ruleset at all.
    pub fn sound(&self) -> Result<(), String> {
        match self.skip_subnets.len() {
            ..=MOST => Ok(()),
            many => Err(format!("{many} subnets, {MOST} is the limit; write wider ones")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn options_that_the_kernel_would_not_take_are_no_ruleset() {
        let many = (0..300).map(|host| Subnet::around(Ipv4Addr::from_bits(host).into(), 32).unwrap());
        let many = Options { skip_subnets: many.collect(), ..Options::default() };
        assert!(many.sound().unwrap_err().contains("256"));
        assert_eq!(Options::default().sound(), Ok(()));
        assert_eq!(Options::own_ports().to_string(), "15000-15020");
    }
}
