//! What is in force, as the kernel tells it, and whether it is what was meant.
//!
//! A rule is compared by what it does, expression by expression: a comment says what somebody meant. What kernels add
//! to what they were told is known here, so that the same rule is the same on each of them.

use crate::TABLE;
use crate::kernel::attributes;
use crate::message;
use crate::ruleset::{Chain, Hook, PRIORITY, Rule, Ruleset};

/// All that decides where connections go.
#[derive(Clone, Debug, Default)]
pub(crate) struct Laid {
    /// The chains of everybody that the kernel asks by itself.
    pub(crate) chains: Vec<LaidChain>,
    /// The rules of our table, in their order.
    pub(crate) rules: Vec<LaidRule>,
}

/// A chain that the kernel asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaidChain {
    pub(crate) family: u8,
    pub(crate) table: String,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) hook: u32,
    pub(crate) priority: i32,
}

/// A rule of our table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaidRule {
    pub(crate) chain: String,
    pub(crate) comment: String,
    pub(crate) does: Vec<Expression>,
}

/// An expression: its name, and what it says of what: attribute, attribute within that (0 if there is none), value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expression {
    name: String,
    says: Vec<(u16, u16, Vec<u8>)>,
}

/// A text of the kernel.
pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The value of an attribute among others.
pub(crate) fn value(of: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(of).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

impl LaidChain {
    /// From the attributes of a chain; `None` of one that other rules jump to.
    pub(crate) fn read(family: u8, of: &[u8]) -> Option<Self> {
        let hook = value(of, message::NFTA_CHAIN_HOOK)?;
        Some(Self {
            family,
            table: text(value(of, message::NFTA_CHAIN_TABLE)?),
            name: text(value(of, message::NFTA_CHAIN_NAME)?),
            kind: text(value(of, message::NFTA_CHAIN_TYPE)?),
            hook: number(value(hook, message::NFTA_HOOK_HOOKNUM)?)?,
            priority: number(value(hook, message::NFTA_HOOK_PRIORITY)?)?.cast_signed(),
        })
    }

    fn is_ours(&self) -> bool {
        self.family == message::NFPROTO_INET && self.table == TABLE
    }
}

impl LaidRule {
    /// From the attributes of a rule.
    pub(crate) fn read(of: &[u8]) -> Option<Self> {
        let comment = value(of, message::NFTA_RULE_USERDATA).and_then(message::comment);
        Some(Self {
            chain: text(value(of, message::NFTA_RULE_CHAIN)?),
            comment: comment.unwrap_or_default().to_owned(),
            does: expressions(value(of, message::NFTA_RULE_EXPRESSIONS).unwrap_or_default()),
        })
    }
}

/// What a list of expressions says, in one form whoever wrote it.
pub(crate) fn expressions(list: &[u8]) -> Vec<Expression> {
    attributes(list).map(|(_, element)| expression(element)).collect()
}

fn expression(element: &[u8]) -> Expression {
    use message::{NFTA_BITWISE_MASK, NFTA_BITWISE_OP, NFTA_BITWISE_XOR, NFTA_CMP_DATA, NFTA_IMMEDIATE_DATA};
    use message::{NFTA_REDIR_REG_PROTO_MAX, NFTA_REDIR_REG_PROTO_MIN};
    let name = text(value(element, message::NFTA_EXPR_NAME).unwrap_or_default());
    let body = value(element, message::NFTA_EXPR_DATA).unwrap_or_default();
    let mut says = Vec::new();
    for (kind, value) in attributes(body) {
        match (name.as_str(), kind) {
            ("cmp", NFTA_CMP_DATA)
            | ("bitwise", NFTA_BITWISE_MASK | NFTA_BITWISE_XOR)
            | ("immediate", NFTA_IMMEDIATE_DATA) => {
                says.extend(attributes(value).map(|(inner, value)| (kind, inner, value.to_vec())));
            }
            // Linux 5.6 and later name the operation: 0, with a mask, which is what there was before.
            ("bitwise", NFTA_BITWISE_OP) if value == [0; 4] => {}
            // The last port is the first one if none was given.
            ("redir", NFTA_REDIR_REG_PROTO_MAX)
                if self::value(body, NFTA_REDIR_REG_PROTO_MIN) == Some(value) => {}
            _ => says.push((kind, 0, value.to_vec())),
        }
    }
    says.sort();
    Expression { name, says }
}

impl Laid {
    /// What of a chain is not as it was meant; `None` if all is.
    pub(crate) fn differs(&self, ruleset: &Ruleset, hook: Hook) -> Option<String> {
        let chain = ruleset.chains.iter().find(|chain| chain.hook == hook)?;
        let asked = |laid: &LaidChain| {
            laid.is_ours()
                && laid.name == chain.name
                && (laid.kind.as_str(), laid.hook, laid.priority) == ("nat", message::number(hook), PRIORITY)
        };
        if !self.chains.iter().any(asked) {
            return Some(format!("the kernel asks no chain {} of the table inet {TABLE}", chain.name));
        }
        self.first_difference(chain)
    }

    fn first_difference(&self, chain: &Chain) -> Option<String> {
        let mut laid = self.rules.iter().filter(|rule| rule.chain == chain.name);
        let same = |rule: &Rule, laid: &LaidRule| expressions(&message::expressions(rule)) == laid.does;
        for (place, rule) in (1..).zip(&chain.rules) {
            match laid.next() {
                Some(laid) if same(rule, laid) => {}
                Some(laid) => {
                    return Some(format!(
                        "rule {place} of the chain {} is to be `{rule}`, and is another one (\"{}\")",
                        chain.name, laid.comment
                    ));
                }
                None => return Some(format!("the chain {} lacks its rule {place}, `{rule}`", chain.name)),
            }
        }
        let more = laid.next()?;
        Some(format!("the chain {} has a rule more than it should (\"{}\")", chain.name, more.comment))
    }

    /// Somebody's chain that decides before ours where connections go, of one of these families.
    pub(crate) fn before_ours(&self, hook: Hook, families: &[u8]) -> Option<String> {
        let before = |chain: &&LaidChain| {
            !chain.is_ours()
                && chain.kind == "nat"
                && chain.hook == message::number(hook)
                && chain.priority <= PRIORITY
                && (chain.family == message::NFPROTO_INET || families.contains(&chain.family))
        };
        let chain = self.chains.iter().find(before)?;
        let family = match chain.family {
            message::NFPROTO_IPV4 => "ip",
            message::NFPROTO_IPV6 => "ip6",
            _ => "inet",
        };
        Some(format!(
            "the chain {} of the table {family} {} (priority {}) redirects before ours ({PRIORITY}); what it takes does \
             not come to the proxy",
            chain.name, chain.table, chain.priority
        ))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::options::Options;

    /// As the kernel would tell of a ruleset.
    pub(crate) fn laid(ruleset: &Ruleset) -> Laid {
        let mut laid = Laid::default();
        for chain in &ruleset.chains {
            laid.chains.push(LaidChain {
                family: message::NFPROTO_INET,
                table: TABLE.to_owned(),
                name: chain.name.to_owned(),
                kind: "nat".to_owned(),
                hook: message::number(chain.hook),
                priority: PRIORITY,
            });
            laid.rules.extend(chain.rules.iter().map(|rule| LaidRule {
                chain: chain.name.to_owned(),
                comment: rule.comment.to_owned(),
                does: expressions(&message::expressions(rule)),
            }));
        }
        laid
    }

    #[test]
    fn what_differs_is_named() {
        let meant = Ruleset::new(&Options::default());
        let of = |options: Options| laid(&Ruleset::new(&options));
        let differs = |laid: &Laid| [Hook::Prerouting, Hook::Output].map(|hook| laid.differs(&meant, hook));
        assert_eq!(differs(&laid(&meant)), [None, None]);
        let said = |options, hook| of(options).differs(&meant, hook).unwrap();
        let only = Options { only_inbound: "1".parse().unwrap(), ..Options::default() };
        assert!(said(only, Hook::Prerouting).contains("rule 3 of the chain inbound"));
        let skip = Options { skip_inbound: "8000".parse().unwrap(), ..Options::default() };
        assert!(said(skip, Hook::Prerouting).contains("skip-inbound-ports"));
        let user = Options { proxy_uid: 7, ..Options::default() };
        assert!(said(user, Hook::Output).contains("`meta skuid 2102 return"));
        let mut laid = laid(&meant);
        let last = laid.rules.pop().unwrap();
        assert!(differs(&laid)[1].as_ref().unwrap().contains("lacks its rule 4"));
        laid.rules.extend([last.clone(), last]);
        assert!(differs(&laid)[1].as_ref().unwrap().contains("a rule more"));
        laid.chains[0].priority = 0;
        assert!(differs(&laid)[0].as_ref().unwrap().contains("asks no chain inbound"));
    }

    #[test]
    fn somebody_elses_chain_counts_if_it_decides_first() {
        let before = |kind: &str, family, priority, hook: Hook| {
            let mut laid = laid(&Ruleset::new(&Options::default()));
            assert_eq!(laid.before_ours(Hook::Output, &[message::NFPROTO_IPV4]), None);
            laid.chains.push(LaidChain {
                family,
                table: "theirs".to_owned(),
                name: "first".to_owned(),
                kind: kind.to_owned(),
                hook: message::number(hook),
                priority,
            });
            laid.before_ours(Hook::Output, &[message::NFPROTO_IPV4]).is_some()
        };
        assert!(before("nat", message::NFPROTO_IPV4, -130, Hook::Output));
        assert!(before("nat", message::NFPROTO_INET, -120, Hook::Output));
        assert!(!before("nat", message::NFPROTO_IPV6, -130, Hook::Output));
        assert!(!before("nat", message::NFPROTO_IPV4, -100, Hook::Output));
        assert!(!before("nat", message::NFPROTO_IPV4, -130, Hook::Prerouting));
        assert!(!before("filter", message::NFPROTO_IPV4, -130, Hook::Output));
    }
}
