//! Redirects a pod's connections to its sidecar.
//!
//! In: [`Options`]. Out: a [`Ruleset`], which is data. It has two outputs: text, exactly as `nft list table inet
//! penstock` shows it, and netlink messages, which [`lay`] hands to the kernel as one transaction: either all rules are
//! in force afterwards or what was in force before still is. [`check()`] proves by real connections that it works.
//!
//! Nothing but CAP_NET_ADMIN is needed: no `nft`, no `iptables`, no C library, no other capability, no writable file.
//! What can go wrong is a [`Problem`], which says what to do.
//!
//! Why the messages are written here: `rustables` is GPL, `nftnl` wraps a C library, `nftables` runs the `nft` binary,
//! and `netlink-packet-netfilter` knows logging and conntrack but no tables. What is needed is five kinds of messages
//! and six kinds of expressions; the socket is rustix's.

mod check;
mod kernel;
mod laid;
mod message;
mod options;
mod routes;
mod ruleset;

pub use check::{Answer, Checked, Family, check};
pub use kernel::{Problem, lay, remove};
pub use options::{Options, Ports, Subnet};
pub use ruleset::{Chain, Connection, Fate, Hook, Match, Rule, Ruleset, Verdict};

/// The table's name; its family is `inet`, IPv4 and IPv6 in one.
pub const TABLE: &str = "penstock";
