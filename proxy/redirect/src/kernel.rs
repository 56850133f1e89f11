//! One conversation with the kernel: a batch goes out, and what it says to it comes back.
//!
//! A transaction is one datagram: the kernel takes all of it or nothing. It needs CAP_NET_ADMIN in the user namespace
//! that owns the network namespace, and no other.

use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};
use thiserror::Error;

use crate::TABLE;
use crate::laid::{self, Laid, LaidChain, LaidRule};
use crate::message::{self, Batch};
use crate::ruleset::Ruleset;

/// The kernel answers within microseconds; whoever waits longer waits for nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// Room for one datagram of answers: the kernel fills at most 32 KiB of a dump at once.
const ROOM: usize = 64 << 10;

// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const NFT_HEADER: usize = 20;

/// Why the rules are not as they should be.
#[derive(Debug, Error)]
pub enum Problem {
    /// There is nobody to talk to.
    #[error(
        "this kernel has no nf_tables ({0}), so nothing was redirected; on the node, `modprobe -a nf_tables nft_chain_nat \
         nft_redir` (or build the kernel with CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT and \
         CONFIG_NFT_REDIR); Linux 5.2 is the oldest that will do"
    )]
    NoTables(Errno),
    /// A part is missing.
    #[error(
        "this kernel's nf_tables does not know {0} ({1}), so nothing was redirected; on the node, `modprobe -a \
         nft_chain_nat nft_redir` (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_REDIR); Linux 5.2 is the oldest that \
         will do"
    )]
    NoPart(String, Errno),
    /// No right to.
    #[error(
        "not permitted: nf_tables needs CAP_NET_ADMIN in this network namespace; give the init container \
         `securityContext: {{capabilities: {{add: [NET_ADMIN]}}}}`, or run it as root (`sudo`); to try it out in a network namespace \
         of your own: `unshare -Urn`"
    )]
    NotPermitted,
    /// Something else.
    #[error("the kernel refused {0}: {1}; nothing has changed")]
    Refused(String, Errno),
    /// The conversation broke off.
    #[error("cannot talk to nf_tables: {0}; whether anything has changed is not known, run it again")]
    Silent(Errno),
}

/// Puts the ruleset in force, in place of the one that an earlier call has laid.
pub fn lay(ruleset: &Ruleset) -> Result<(), Problem> {
    transact(&message::lay(ruleset))
}

/// Takes the ruleset out of force, and says whether there was one.
pub fn remove() -> Result<bool, Problem> {
    let mut there = false;
    dump(&message::list_tables(), |family, of| {
        let name = laid::value(of, message::NFTA_TABLE_NAME).map(laid::text);
        there |= family == message::NFPROTO_INET && name.as_deref() == Some(TABLE);
    })?;
    transact(&message::remove())?;
    Ok(there)
}

/// What is in force.
pub(crate) fn laid() -> Result<Laid, Problem> {
    let mut laid = Laid::default();
    dump(&message::list_chains(), |family, of| laid.chains.extend(LaidChain::read(family, of)))?;
    dump(&message::list(), |_, of| laid.rules.extend(LaidRule::read(of)))?;
    Ok(laid)
}

/// Hands the family and the attributes of each thing that is listed to `take`.
fn dump(batch: &Batch, mut take: impl FnMut(u8, &[u8])) -> Result<(), Problem> {
    converse(batch, |kind, body| {
        if kind == NLMSG_DONE {
            return true;
        }
        if let (Some(family), Some(attributes)) = (body.first(), body.get(NFT_HEADER - HEADER..)) {
            take(*family, attributes);
        }
        false
    })
}

fn transact(batch: &Batch) -> Result<(), Problem> {
    // The acknowledgement of the last message is an error message of number 0, and `converse` ends with it.
    converse(batch, |_, _| false)
}

/// Sends a batch and hands what comes back to `take`, until that says that it was all.
fn converse(batch: &Batch, mut take: impl FnMut(u16, &[u8]) -> bool) -> Result<(), Problem> {
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))
            .map_err(|error| match error {
                Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => Problem::NoTables(error),
                Errno::ACCESS | Errno::PERM => Problem::NotPermitted,
                other => Problem::Silent(other),
            })?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).map_err(Problem::Silent)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &batch.bytes, SendFlags::empty(), &kernel).map_err(|error| match error {
        Errno::PERM | Errno::ACCESS => Problem::NotPermitted,
        Errno::CONNREFUSED => Problem::NoTables(error),
        Errno::MSGSIZE => Problem::Refused("so many rules at once".to_owned(), error),
        other => Problem::Silent(other),
    })?;
    let mut buffer = vec![0; ROOM];
    loop {
        let (length, _) = match recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Err(Errno::INTR) => continue,
            other => other.map_err(Problem::Silent)?,
        };
        for (kind, number, body) in messages(&buffer[..length]) {
            if kind != NLMSG_ERROR {
                if take(kind, body) {
                    return Ok(());
                }
                continue;
            }
            let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
            match code {
                0 if number == batch.last => return Ok(()),
                0 => {}
                code => return Err(refused(batch, number, Errno::from_raw_os_error(-code))),
            }
        }
    }
}

fn refused(batch: &Batch, number: u32, error: Errno) -> Problem {
    let what = batch.names.get(number as usize).cloned().unwrap_or_default();
    match error {
        Errno::PERM | Errno::ACCESS => Problem::NotPermitted,
        // The whole batch: the subsystem is not there.
        Errno::OPNOTSUPP if number == 0 => Problem::NoTables(error),
        Errno::OPNOTSUPP | Errno::NOENT | Errno::AFNOSUPPORT => Problem::NoPart(what, error),
        other => Problem::Refused(what, other),
    }
}

/// The messages of a datagram: kind, sequence number, what follows the header.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<HEADER>()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let number = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, number, body))
    })
}

/// The attributes of a message: kind, value.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        // The two upper bits say how to read the value.
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    #[test]
    fn what_is_missing_is_told_apart_from_what_is_forbidden() {
        let batch = message::lay(&Ruleset::new(&Options::default()));
        let said = |number, error| refused(&batch, number, error).to_string();
        assert!(said(0, Errno::PERM).contains("CAP_NET_ADMIN"));
        assert!(
            said(0, Errno::OPNOTSUPP).contains("no nf_tables")
                && said(0, Errno::OPNOTSUPP).contains("modprobe")
        );
        let chain = batch.names.iter().position(|name| name == "the chain inbound").unwrap();
        assert!(said(chain as u32, Errno::NOENT).contains("does not know the chain inbound"));
        let other = said(batch.last, Errno::NOMEM);
        assert!(
            other.contains("to the proxy, from the application") && other.contains("nothing has changed")
        );
    }

    #[test]
    fn an_answer_that_is_cut_off_ends_the_reading() {
        let batch = message::list();
        assert_eq!(messages(&batch.bytes).count(), 1);
        for length in 0..batch.bytes.len() {
            assert_eq!(messages(&batch.bytes[..length]).count(), 0, "{length}");
        }
        // A length that leads nowhere does not go round in circles.
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }
}
