//! A ruleset as the kernel reads it: nf_tables messages in one batch (`linux/netfilter/nf_tables.h`, `nfnetlink.h`,
//! `netlink.h`). Names are the headers'. Numbers in attributes are in network order; the headers of messages, and what
//! is compared with a register that holds a number of this machine (the user's), in this machine's own.

use crate::TABLE;
use crate::options::Subnet;
use crate::ruleset::{Chain, Hook, Match, PRIORITY, Rule, Ruleset, Verdict};
use std::net::IpAddr;

// linux/netlink.h
pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 0x8000;
// linux/netfilter/nfnetlink.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
// linux/netfilter.h
const NFPROTO_UNSPEC: u8 = 0;
pub(crate) const NFPROTO_INET: u8 = 1;
pub(crate) const NFPROTO_IPV4: u8 = 2;
pub(crate) const NFPROTO_IPV6: u8 = 10;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_ACCEPT: u32 = 1;
// linux/netfilter/nf_nat.h
const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;
// linux/netfilter/nf_tables.h
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
pub(crate) const NFTA_TABLE_NAME: u16 = 1;
pub(crate) const NFTA_CHAIN_TABLE: u16 = 1;
pub(crate) const NFTA_CHAIN_NAME: u16 = 3;
pub(crate) const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
pub(crate) const NFTA_CHAIN_TYPE: u16 = 7;
pub(crate) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(crate) const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
pub(crate) const NFTA_RULE_CHAIN: u16 = 2;
pub(crate) const NFTA_RULE_EXPRESSIONS: u16 = 4;
pub(crate) const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;
pub(crate) const NFTA_EXPR_NAME: u16 = 1;
pub(crate) const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_SKUID: u32 = 10;
const NFT_META_NFPROTO: u32 = 15;
const NFT_META_L4PROTO: u32 = 16;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
pub(crate) const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_LTE: u32 = 3;
const NFT_CMP_GTE: u32 = 5;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
pub(crate) const NFTA_BITWISE_MASK: u16 = 4;
pub(crate) const NFTA_BITWISE_XOR: u16 = 5;
pub(crate) const NFTA_BITWISE_OP: u16 = 6;
const NFTA_IMMEDIATE_DREG: u16 = 1;
pub(crate) const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
pub(crate) const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;
pub(crate) const NFTA_REDIR_REG_PROTO_MAX: u16 = 2;
const NFTA_REDIR_FLAGS: u16 = 3;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_RETURN: i32 = -5;
const IPPROTO_TCP: u8 = 6;
const IFNAMSIZ: usize = 16;
/// Of libnftnl's `udata.h`: the type of a rule's comment.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;

/// Messages for one datagram. The sequence number of a message is its place among them.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    /// Sequence number of the message whose acknowledgement says that all is done.
    pub(crate) last: u32,
    /// What each message is about, for whoever has to say that it was refused.
    pub(crate) names: Vec<String>,
}

/// The table that was there is replaced, whatever was in it. Adding it first makes that true of none, too.
pub(crate) fn lay(ruleset: &Ruleset) -> Batch {
    let mut batch = Batch::default();
    batch.begin();
    batch.table(NFT_MSG_NEWTABLE, NLM_F_CREATE);
    batch.table(NFT_MSG_DELTABLE, 0);
    batch.table(NFT_MSG_NEWTABLE, NLM_F_CREATE);
    for chain in &ruleset.chains {
        batch.chain(chain);
    }
    for chain in &ruleset.chains {
        for rule in &chain.rules {
            batch.rule(chain.name, rule);
        }
    }
    batch.end();
    batch
}

/// The table is gone afterwards, whether or not there was one.
pub(crate) fn remove() -> Batch {
    let mut batch = Batch::default();
    batch.begin();
    batch.table(NFT_MSG_NEWTABLE, NLM_F_CREATE);
    batch.table(NFT_MSG_DELTABLE, 0);
    batch.end();
    batch
}

/// Asks for all tables, whoever laid them.
pub(crate) fn list_tables() -> Batch {
    let mut batch = Batch::default();
    let what = "to list the tables".to_owned();
    let kind = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETTABLE;
    batch.message(what, (kind, NLM_F_DUMP), (NFPROTO_UNSPEC, 0), |_| {});
    batch
}

/// Asks for all chains, whoever laid them.
pub(crate) fn list_chains() -> Batch {
    let mut batch = Batch::default();
    let what = "to list the chains".to_owned();
    let kind = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETCHAIN;
    batch.message(what, (kind, NLM_F_DUMP), (NFPROTO_UNSPEC, 0), |_| {});
    batch
}

/// What a rule does, as it is told to the kernel.
pub(crate) fn expressions(rule: &Rule) -> Vec<u8> {
    let mut body = Attributes::default();
    for condition in &rule.matches {
        body.condition(condition);
    }
    body.verdict(&rule.verdict);
    body.0
}

/// The number of a hook, as the kernel counts them for IPv4, IPv6 and both.
pub(crate) fn number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => NF_INET_PRE_ROUTING,
        Hook::Output => NF_INET_LOCAL_OUT,
    }
}

/// Asks for all rules of the table.
pub(crate) fn list() -> Batch {
    let mut batch = Batch::default();
    batch.nft("to list the rules".to_owned(), NFT_MSG_GETRULE, NLM_F_DUMP, |body| {
        body.text(NFTA_RULE_TABLE, TABLE)
    });
    batch
}

/// The comment in a rule's user data, as [`lay`] wrote it.
pub(crate) fn comment(userdata: &[u8]) -> Option<&str> {
    let (&[kind, length], value) = userdata.split_first_chunk::<2>()?;
    let value = value.get(..usize::from(length))?.strip_suffix(&[0])?;
    (kind == NFTNL_UDATA_RULE_COMMENT).then(|| std::str::from_utf8(value).ok())?
}

impl Batch {
    fn begin(&mut self) {
        let whole = "the batch".to_owned();
        self.message(whole, (NFNL_MSG_BATCH_BEGIN, 0), (NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES), |_| {});
    }

    /// Errors come of any message, in order; success is heard of the last one only, so that a long batch does not
    /// overflow the socket with acknowledgements.
    fn end(&mut self) {
        let whole = "the batch".to_owned();
        self.message(whole, (NFNL_MSG_BATCH_END, 0), (NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES), |_| {});
        self.last = self.names.len() as u32 - 2;
        let mut start = 0;
        for _ in 0..self.last {
            start += self.length_at(start);
        }
        let flags = NLM_F_REQUEST | NLM_F_ACK | self.flags_at(start);
        self.bytes[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
    }

    fn length_at(&self, start: usize) -> usize {
        let bytes = [0, 1, 2, 3].map(|byte| self.bytes[start + byte]);
        (u32::from_ne_bytes(bytes) as usize).next_multiple_of(4)
    }

    fn flags_at(&self, start: usize) -> u16 {
        u16::from_ne_bytes([self.bytes[start + 6], self.bytes[start + 7]])
    }

    /// `struct nlmsghdr`, `struct nfgenmsg`, attributes.
    fn message(
        &mut self,
        name: String,
        (kind, flags): (u16, u16),
        (family, resource): (u8, u16),
        fill: impl FnOnce(&mut Attributes),
    ) {
        let mut attributes = Attributes::default();
        fill(&mut attributes);
        let length = 20 + attributes.0.len() as u32;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend((self.names.len() as u32).to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes.0);
        self.names.push(name);
    }

    fn nft(&mut self, name: String, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        self.message(name, ((NFNL_SUBSYS_NFTABLES << 8) | kind, flags), (NFPROTO_INET, 0), fill);
    }

    fn table(&mut self, kind: u16, flags: u16) {
        self.nft(format!("the table {TABLE}"), kind, flags, |body| body.text(NFTA_TABLE_NAME, TABLE));
    }

    fn chain(&mut self, chain: &Chain) {
        self.nft(format!("the chain {}", chain.name), NFT_MSG_NEWCHAIN, NLM_F_CREATE, |body| {
            body.text(NFTA_CHAIN_TABLE, TABLE);
            body.text(NFTA_CHAIN_NAME, chain.name);
            body.nested(NFTA_CHAIN_HOOK, |body| {
                body.number(NFTA_HOOK_HOOKNUM, number(chain.hook));
                body.number(NFTA_HOOK_PRIORITY, PRIORITY.cast_unsigned());
            });
            body.number(NFTA_CHAIN_POLICY, NF_ACCEPT);
            body.text(NFTA_CHAIN_TYPE, "nat");
        });
    }

    fn rule(&mut self, chain: &str, rule: &Rule) {
        self.nft(format!("the rule `{rule}`"), NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |body| {
            body.text(NFTA_RULE_TABLE, TABLE);
            body.text(NFTA_RULE_CHAIN, chain);
            body.bytes(NFTA_RULE_EXPRESSIONS | NLA_F_NESTED, &expressions(rule));
            let length = rule.comment.len() as u8 + 1;
            let userdata = [&[NFTNL_UDATA_RULE_COMMENT, length], rule.comment.as_bytes(), &[0]].concat();
            body.bytes(NFTA_RULE_USERDATA, &userdata);
        });
    }
}

/// Attributes, one after the other: `struct nlattr` and what it announces, in steps of four bytes.
#[derive(Debug, Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.bytes(kind, &[text.as_bytes(), &[0]].concat());
    }

    fn number(&mut self, kind: u16, number: u32) {
        self.bytes(kind, &number.to_be_bytes());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(kind | NLA_F_NESTED, &inner.0);
    }

    fn data(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |body| body.bytes(NFTA_DATA_VALUE, value));
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.nested(NFTA_LIST_ELEM, |body| {
            body.text(NFTA_EXPR_NAME, name);
            body.nested(NFTA_EXPR_DATA, fill);
        });
    }

    /// What is known of the packet, into register 1.
    fn meta(&mut self, key: u32) {
        self.expression("meta", |body| {
            body.number(NFTA_META_KEY, key);
            body.number(NFTA_META_DREG, NFT_REG_1);
        });
    }

    /// Bytes of the packet, into register 1.
    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.expression("payload", |body| {
            body.number(NFTA_PAYLOAD_DREG, NFT_REG_1);
            body.number(NFTA_PAYLOAD_BASE, base);
            body.number(NFTA_PAYLOAD_OFFSET, offset);
            body.number(NFTA_PAYLOAD_LEN, length);
        });
    }

    /// The rule goes on only if register 1 compares so.
    fn compare(&mut self, operation: u32, value: &[u8]) {
        self.expression("cmp", |body| {
            body.number(NFTA_CMP_SREG, NFT_REG_1);
            body.number(NFTA_CMP_OP, operation);
            body.data(NFTA_CMP_DATA, value);
        });
    }

    fn condition(&mut self, condition: &Match) {
        match condition {
            Match::StaysHere(hook) => {
                // The name of an interface is padded with zeros.
                let mut name = [0; IFNAMSIZ];
                name[..2].copy_from_slice(b"lo");
                self.meta(match hook {
                    Hook::Prerouting => NFT_META_IIFNAME,
                    Hook::Output => NFT_META_OIFNAME,
                });
                self.compare(NFT_CMP_EQ, &name);
            }
            Match::User(uid) => {
                self.meta(NFT_META_SKUID);
                self.compare(NFT_CMP_EQ, &uid.to_ne_bytes());
            }
            Match::Tcp => {
                self.meta(NFT_META_L4PROTO);
                self.compare(NFT_CMP_EQ, &[IPPROTO_TCP]);
            }
            Match::Port(range) => {
                self.condition(&Match::Tcp);
                // The destination port of a TCP header.
                self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);
                if range.start() == range.end() {
                    self.compare(NFT_CMP_EQ, &range.start().to_be_bytes());
                } else {
                    self.compare(NFT_CMP_GTE, &range.start().to_be_bytes());
                    self.compare(NFT_CMP_LTE, &range.end().to_be_bytes());
                }
            }
            Match::To(subnet) => self.destination(subnet),
        }
    }

    fn destination(&mut self, subnet: &Subnet) {
        // Where the destination is in the header of IPv4 and of IPv6.
        let (family, offset, address) = match subnet.address() {
            IpAddr::V4(address) => (NFPROTO_IPV4, 16, address.octets().to_vec()),
            IpAddr::V6(address) => (NFPROTO_IPV6, 24, address.octets().to_vec()),
        };
        self.meta(NFT_META_NFPROTO);
        self.compare(NFT_CMP_EQ, &[family]);
        if subnet.bits() == 0 {
            return;
        }
        let length = address.len() as u32;
        self.payload(NFT_PAYLOAD_NETWORK_HEADER, offset, length);
        if !subnet.is_one() {
            let bits = usize::from(subnet.bits());
            let mask: Vec<u8> = (0..address.len())
                .map(|byte| {
                    let of_this = bits.saturating_sub(byte * 8).min(8) as u32;
                    u8::MAX.checked_shl(8 - of_this).unwrap_or(0)
                })
                .collect();
            self.expression("bitwise", |body| {
                body.number(NFTA_BITWISE_SREG, NFT_REG_1);
                body.number(NFTA_BITWISE_DREG, NFT_REG_1);
                body.number(NFTA_BITWISE_LEN, length);
                body.data(NFTA_BITWISE_MASK, &mask);
                body.data(NFTA_BITWISE_XOR, &vec![0; address.len()]);
            });
        }
        self.compare(NFT_CMP_EQ, &address);
    }

    fn verdict(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Return => self.expression("immediate", |body| {
                body.number(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
                body.nested(NFTA_IMMEDIATE_DATA, |body| {
                    body.nested(NFTA_DATA_VERDICT, |body| {
                        body.number(NFTA_VERDICT_CODE, NFT_RETURN.cast_unsigned());
                    });
                });
            }),
            Verdict::Redirect(port) => {
                self.expression("immediate", |body| {
                    body.number(NFTA_IMMEDIATE_DREG, NFT_REG_1);
                    body.data(NFTA_IMMEDIATE_DATA, &port.to_be_bytes());
                });
                self.expression("redir", |body| {
                    body.number(NFTA_REDIR_REG_PROTO_MIN, NFT_REG_1);
                    body.number(NFTA_REDIR_FLAGS, NF_NAT_RANGE_PROTO_SPECIFIED);
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    #[test]
    fn every_message_and_attribute_says_its_own_length() {
        let batch = lay(&Ruleset::new(&Options {
            skip_subnets: vec!["10.16.0.0/12".parse().unwrap(), "fd00::/9".parse().unwrap()],
            ..Options::default()
        }));
        let mut rest = batch.bytes.as_slice();
        let mut asked = Vec::new();
        let mut number = 0u32;
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], number.to_ne_bytes());
            assert!(length.is_multiple_of(4) && length >= 20 && length <= rest.len());
            if u16::from_ne_bytes([rest[6], rest[7]]) & NLM_F_ACK != 0 {
                asked.push(number);
            }
            let mut attributes = &rest[20..length];
            while !attributes.is_empty() {
                let length = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]]));
                assert!(length >= 4 && length <= attributes.len());
                attributes = &attributes[length.next_multiple_of(4)..];
            }
            rest = &rest[length..];
            number += 1;
        }
        assert_eq!(asked, [batch.last]);
        assert_eq!(batch.last, number - 2, "the last but the end of the batch");
    }

    #[test]
    fn a_comment_is_read_as_it_was_written() {
        assert_eq!(comment(b"\0\x03hi\0"), Some("hi"));
        for strange in [&b""[..], b"\0", b"\0\x05hi\0", b"\x01\x03hi\0", b"\0\x02hi"] {
            assert_eq!(comment(strange), None, "{strange:?}");
        }
    }
}
