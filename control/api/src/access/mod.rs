//! Authorization: may this client ask that of the application? Pure.
//!
//! In: the policies in force ([`Access`], compiled from what control pushes) and the [`Facts`] of a request or a
//! connection. Out: a [`Decision`] with the policy and the rule behind it. Proxies decide by it, and control says by the
//! same code what they would decide, and why. Deciding allocates nothing.
//!
//! 1. A rule of a Deny policy that matches denies.
//! 2. If any Allow policy is about the port, one of their rules has to match; otherwise nothing allows it.
//! 3. Without policies everything is allowed.
//!
//! What is not known for sure counts against the client: an Allow matches only what it is certain of, a Deny also what
//! may be so. That is why comparing has three outcomes ([`Match`]).

mod entry;
mod model;
mod pattern;
mod rate;

use std::borrow::Cow;
use std::fmt;

use http::HeaderMap;

use crate::SpiffeId;
use crate::v1::{self, access_policy::Effect};
pub use entry::{Arrival, Came, Entry, HEALTH};
pub use model::{Named, OIP};
pub use pattern::Pattern;
pub use rate::{By, Key, Rate, RateLimit};

/// The newest kind of condition that this code knows.
pub const LEVEL: u32 = 1;

/// What is known of a request, or of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Whom the client proved to be.
    pub client: Option<&'a SpiffeId>,
    /// The port of the pod.
    pub port: u16,
    /// `None`: bytes that are not looked at.
    pub http: Option<Http<'a>>,
}

/// What is known of a request.
#[derive(Clone, Copy, Debug)]
pub struct Http<'a> {
    /// The method.
    pub method: &'a str,
    /// The path in its canonical form, without query.
    pub path: &'a str,
    /// The model that is asked for.
    pub model: Model<'a>,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// The model that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Model<'a> {
    /// It is about no model.
    None,
    /// `name`, or `name/version`.
    Named(&'a str),
    /// It may be about one, and which cannot be told.
    Unknown,
}

/// Whether a rule matches. In this order, so that `min` is "and", and `max` is "or".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    /// It does not.
    No,
    /// It may.
    Maybe,
    /// It does.
    Yes,
}

/// The policies of one pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    policies: Vec<Policy>,
    looks_at_paths: bool,
    looks_at_models: bool,
    audits_paths: bool,
    audits_models: bool,
    looks_at_host: bool,
}

/// One policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `<namespace>/<name>`.
    pub name: Box<str>,
    /// Whether what matches is denied; otherwise it is allowed.
    pub denies: bool,
    /// It only reports.
    pub audit: bool,
    /// Why it cannot be read; it denies everything then.
    pub unreadable: Option<Box<str>>,
    ports: Vec<u16>,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Rule {
    /// What it is called in stories: `rule 1 (readers)`.
    label: Box<str>,
    from: Vec<From>,
    to: Vec<To>,
    headers: Vec<Header>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct From {
    identities: List,
    namespaces: List,
    accounts: List,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct To {
    methods: List,
    paths: List,
    grpc: List,
    models: List,
    ports: Vec<u16>,
    not_ports: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq)]
struct Header {
    name: http::HeaderName,
    values: List,
}

/// One of these, and none of those; an empty list asks for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
struct List {
    of: Vec<Pattern>,
    not: Vec<Pattern>,
}

/// What is decided, and by what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision<'a> {
    /// Why it is denied; `None`: it is allowed.
    pub denied: Option<Why<'a>>,
    /// The rule that allows it; `None`: no policy asks, or it is denied.
    pub allowed: Option<(&'a Policy, &'a str)>,
    /// Why it would be denied if the policies that only report were in force.
    pub would_deny: Option<Why<'a>>,
}

/// Why something is denied. Displays as the story.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Why<'a> {
    /// A rule of a policy denies it.
    Rule(&'a Policy, &'a str),
    /// There are policies that allow something, and none allows this; the first of them.
    NothingAllows(&'a Policy, usize),
    /// It is bytes, and the policy denies something that only HTTP says.
    Unseen(&'a Policy),
    /// The policy decides by a path that servers read differently.
    Unclear(&'a Policy),
}

impl Why<'_> {
    /// The policy's name, for metrics: one of those that control pushes. That of the first, where none allows it.
    pub fn policy(&self) -> &str {
        let (Self::Rule(policy, _)
        | Self::NothingAllows(policy, _)
        | Self::Unseen(policy)
        | Self::Unclear(policy)) = self;
        &policy.name
    }
}

impl fmt::Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(Policy { name, unreadable: Some(why), .. }, _) => {
                write!(f, "AccessPolicy {name} cannot be read and therefore denies everything; {why}")
            }
            Self::Rule(policy, rule) => write!(f, "{rule} of AccessPolicy {} denies it", policy.name),
            Self::Unseen(policy) => write!(
                f,
                "AccessPolicy {} denies something that only HTTP says, and nobody can tell whether these bytes are that; \
                 declare the port opaque (appProtocol: tcp) if it is to take bytes",
                policy.name
            ),
            Self::Unclear(policy) => {
                write!(f, "servers read the path differently, and AccessPolicy {} decides by it", policy.name)
            }
            Self::NothingAllows(first, 1) => {
                write!(f, "no policy allows it: only AccessPolicy {} allows anything here", first.name)
            }
            Self::NothingAllows(first, count) => {
                write!(
                    f,
                    "no policy allows it: AccessPolicy {} and {} more allow something here",
                    first.name,
                    count - 1
                )
            }
        }
    }
}

impl Access {
    /// Compiles what control pushed. The error says what this proxy does not understand.
    pub fn compile(from: &v1::Access) -> Result<Self, String> {
        if from.level > LEVEL {
            return Err(format!(
                "it has conditions of level {}, and this proxy knows {LEVEL}; upgrade it",
                from.level
            ));
        }
        let policies = from.policies.iter().map(policy).collect::<Result<Vec<_>, String>>()?;
        let paths = |audit| move |policy: &Policy| policy.audit == audit && policy.looks_at_paths();
        let models = |audit| move |policy: &Policy| policy.audit == audit && policy.looks_at_models();
        Ok(Self {
            looks_at_models: policies.iter().any(models(false)),
            audits_models: policies.iter().any(models(true)),
            looks_at_paths: policies.iter().any(paths(false)),
            audits_paths: policies.iter().any(paths(true)),
            looks_at_host: policies.iter().flat_map(|policy| &policy.rules).any(Rule::looks_at_host),
            policies,
        })
    }

    /// Whether there is no policy: everything is allowed.
    pub fn is_open(&self) -> bool {
        self.policies.is_empty()
    }

    /// Whether a rule that is in force asks for the path, so that it has to be canonical.
    pub fn looks_at_paths(&self) -> bool {
        self.looks_at_paths
    }

    /// Whether a rule that is in force asks for the model.
    pub fn looks_at_models(&self) -> bool {
        self.looks_at_models
    }

    /// Whether a rule that only reports asks for the path. It is compared in its canonical form too, and passes as it came.
    pub fn audits_paths(&self) -> bool {
        self.audits_paths
    }

    /// Whether a rule that only reports asks for the model. Nothing may wait for that.
    pub fn audits_models(&self) -> bool {
        self.audits_models
    }

    /// Whether a rule asks for the host.
    pub fn looks_at_host(&self) -> bool {
        self.looks_at_host
    }

    /// Why a path that has no canonical form would be refused, if the policies that only report were in force.
    pub fn would_refuse_unclear(&self) -> Option<Why<'_>> {
        self.policies.iter().find(|policy| policy.audit && policy.looks_at_paths()).map(Why::Unclear)
    }

    /// Why something over the port is denied by what only HTTP says, so that who does not look like HTTP would get around it.
    pub fn denies_by_http(&self, port: u16) -> Option<Why<'_>> {
        self.asking_of_http(port, false)
    }

    /// The same, of the policies that only report.
    pub fn would_deny_by_http(&self, port: u16) -> Option<Why<'_>> {
        self.asking_of_http(port, true)
    }

    fn asking_of_http(&self, port: u16, audit: bool) -> Option<Why<'_>> {
        let mut denying = self
            .policies
            .iter()
            .filter(|policy| policy.denies && policy.audit == audit && policy.is_about(port));
        denying.find(|policy| policy.rules.iter().any(|rule| rule.asks_of_http(port))).map(Why::Unseen)
    }

    /// The policies, in the order in which they are asked.
    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// Whether anything that the client may ask over the port is allowed, as far as that can be told before it asks. Who is
    /// denied whatever he asks learns nothing, not even how busy the application is.
    pub fn may_ask_something(&self, client: Option<&SpiffeId>, port: u16) -> bool {
        let mut about = self.policies.iter().filter(|policy| !policy.audit && policy.is_about(port));
        let always = |rule: &Rule| rule.is_from(client) >= Match::Maybe && rule.whatever_is_asked(port);
        if about.clone().any(|policy| policy.denies && policy.rules.iter().any(always)) {
            return false;
        }
        let sometimes = |rule: &Rule| rule.is_from(client) == Match::Yes && rule.is_to_port(port);
        about.clone().all(|policy| policy.denies)
            || about.any(|policy| !policy.denies && policy.rules.iter().any(sometimes))
    }

    /// Decides.
    pub fn decide<'a>(&'a self, facts: &Facts<'_>) -> Decision<'a> {
        let about = || self.policies.iter().filter(|policy| policy.is_about(facts.port));
        let denying = |audit: bool| {
            let mut found = about().filter(move |policy| policy.denies && policy.audit == audit);
            found.find_map(|policy| Some(Why::Rule(policy, policy.first(facts, Match::Maybe)?)))
        };
        let allowing = |audits: bool| {
            let mut found = about().filter(move |policy| !policy.denies && (audits || !policy.audit));
            found.find_map(|policy| Some((policy, policy.first(facts, Match::Yes)?)))
        };
        let nothing_allows = |audits: bool| {
            let mut asking = about().filter(move |policy| !policy.denies && (audits || !policy.audit));
            let first = asking.next()?;
            Some(Why::NothingAllows(first, 1 + asking.count()))
        };
        let allowed = allowing(false);
        let denied = denying(false).or_else(|| if allowed.is_some() { None } else { nothing_allows(false) });
        if denied.is_some() {
            return Decision { denied, allowed: None, would_deny: None };
        }
        let would_deny =
            denying(true).or_else(|| if allowing(true).is_some() { None } else { nothing_allows(true) });
        Decision { denied, allowed, would_deny }
    }
}

impl Policy {
    /// Whether it is about that port.
    pub fn is_about(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    fn looks_at_paths(&self) -> bool {
        self.rules.iter().any(Rule::looks_at_paths)
    }

    fn looks_at_models(&self) -> bool {
        self.rules.iter().any(Rule::looks_at_models)
    }

    /// The first rule that matches at least so surely.
    fn first(&self, facts: &Facts<'_>, least: Match) -> Option<&str> {
        self.rules.iter().find(|rule| rule.matches(facts) >= least).map(|rule| &*rule.label)
    }
}

impl Rule {
    fn looks_at_paths(&self) -> bool {
        // A model may stand in the path.
        self.to.iter().any(|to| to.paths.is_said() || to.grpc.is_said() || to.models.is_said())
    }

    fn looks_at_models(&self) -> bool {
        self.to.iter().any(|to| to.models.is_said())
    }

    fn looks_at_host(&self) -> bool {
        self.headers.iter().any(|header| header.name == http::header::HOST)
    }

    fn is_from(&self, client: Option<&SpiffeId>) -> Match {
        surest(&self.from, |from| from.matches(client))
    }

    fn is_to_port(&self, port: u16) -> bool {
        self.to.is_empty() || self.to.iter().any(|to| to.is_port(port))
    }

    /// It asks for something over the port that only HTTP says.
    fn asks_of_http(&self, port: u16) -> bool {
        let to = |to: &To| to.is_port(port) && to.asks_of_http();
        self.is_to_port(port) && !self.headers.is_empty() || self.to.iter().any(to)
    }

    /// It matches everything over the port.
    fn whatever_is_asked(&self, port: u16) -> bool {
        let to = |to: &To| to.is_port(port) && !to.asks_of_http();
        self.headers.is_empty() && (self.to.is_empty() || self.to.iter().any(to))
    }

    fn matches(&self, facts: &Facts<'_>) -> Match {
        let from = self.is_from(facts.client);
        if from == Match::No {
            return from;
        }
        let to = surest(&self.to, |to| to.matches(facts));
        let headers = self.headers.iter().map(|header| match facts.http {
            Some(http) => header.matches(http.headers),
            None => Match::No,
        });
        headers.fold(from.min(to), Match::min)
    }
}

impl From {
    fn matches(&self, client: Option<&SpiffeId>) -> Match {
        let Some(id) = client else {
            // Nobody in particular: on no list of those who are meant, and maybe one of those who are not excepted.
            let said =
                [&self.identities, &self.namespaces, &self.accounts].iter().any(|list| !list.of.is_empty());
            return if said { Match::No } else { Match::Maybe };
        };
        let (_, namespace, account) = id.parts();
        yes(self.identities.holds(|pattern| pattern.matches(id.as_str().as_bytes()))
            && self.namespaces.holds(|pattern| pattern.matches(namespace.as_bytes()))
            && self.accounts.holds(|pattern| pattern.matches_account(namespace, account)))
    }
}

impl To {
    fn asks_of_http(&self) -> bool {
        [&self.methods, &self.paths, &self.grpc, &self.models].iter().any(|list| list.is_said())
    }

    fn is_port(&self, port: u16) -> bool {
        (self.ports.is_empty() || self.ports.contains(&port)) && !self.not_ports.contains(&port)
    }

    fn matches(&self, facts: &Facts<'_>) -> Match {
        if !self.is_port(facts.port) {
            return Match::No;
        }
        let Some(http) = facts.http else {
            // What asks for HTTP never matches bytes.
            return yes(!self.asks_of_http());
        };
        fn is(text: &str) -> impl Fn(&Pattern) -> bool {
            move |pattern| pattern.matches(text.as_bytes())
        }
        // Methods differ by case, and not all servers know that.
        let method = match http.method.bytes().any(|byte| byte.is_ascii_lowercase()) {
            true => Cow::Owned(http.method.to_ascii_uppercase()),
            false => Cow::Borrowed(http.method),
        };
        // CONNECT has no path (RFC 9110, 9.3.6), and what will be said over it is not known.
        if http.path.is_empty() && [&self.paths, &self.grpc, &self.models].iter().any(|list| list.is_said()) {
            return if self.methods.holds(is(&method)) { Match::Maybe } else { Match::No };
        }
        if !(self.methods.holds(is(&method))
            && self.paths.holds(is(http.path))
            && self.grpc.holds(is(http.path)))
        {
            return Match::No;
        }
        match http.model {
            Model::Named(model) => yes(self.models.holds(is(model))),
            // It is none of those that are excepted, and none of those that are meant.
            Model::None => yes(self.models.of.is_empty()),
            Model::Unknown if self.models.is_said() => Match::Maybe,
            Model::Unknown => Match::Yes,
        }
    }
}

impl Header {
    fn matches(&self, headers: &HeaderMap) -> Match {
        let mut values = headers.get_all(&self.name).iter().peekable();
        if values.peek().is_none() {
            // Nothing of what is meant; and nothing that is excepted, if only that was said.
            return yes(self.values.of.is_empty() && !self.values.not.is_empty());
        }
        // Which of several values the application takes is its own affair.
        let mut all = true;
        let mut some = false;
        for value in values {
            let holds = self.values.holds(|pattern| pattern.matches(value.as_bytes()));
            all &= holds;
            some |= holds;
        }
        if all {
            Match::Yes
        } else if some {
            Match::Maybe
        } else {
            Match::No
        }
    }
}

impl List {
    fn is_said(&self) -> bool {
        !(self.of.is_empty() && self.not.is_empty())
    }

    fn holds(&self, matches: impl Fn(&Pattern) -> bool) -> bool {
        (self.of.is_empty() || self.of.iter().any(&matches)) && !self.not.iter().any(&matches)
    }
}

fn yes(holds: bool) -> Match {
    if holds { Match::Yes } else { Match::No }
}

/// The surest of them; where none is said, all are meant.
fn surest<T>(list: &[T], matches: impl Fn(&T) -> Match) -> Match {
    if list.is_empty() {
        return Match::Yes;
    }
    list.iter().map(matches).max().unwrap_or(Match::No)
}

fn policy(from: &v1::AccessPolicy) -> Result<Policy, String> {
    let wrong = |error: String| format!("AccessPolicy {}: {error}", from.name);
    let denies = match from.effect() {
        Effect::Allow => false,
        Effect::Deny => true,
        Effect::Unspecified => {
            return Err(wrong("an effect that this proxy does not know; upgrade it".into()));
        }
    };
    // Whatever else is said of what cannot be read: a rule that matches everything, and denies.
    let unreadable: Option<Box<str>> = (!from.unreadable.is_empty()).then(|| from.unreadable.as_str().into());
    let rules = match unreadable {
        Some(_) => Ok(vec![Rule::default()]),
        None => from.rules.iter().enumerate().map(|(index, from)| rule(index, from)).collect(),
    };
    Ok(Policy {
        name: from.name.as_str().into(),
        denies: denies || unreadable.is_some(),
        audit: from.audit,
        unreadable,
        ports: ports(&from.ports).map_err(wrong)?,
        rules: rules.map_err(wrong)?,
    })
}

fn rule(index: usize, from: &v1::AccessRule) -> Result<Rule, String> {
    let label = match from.name.as_str() {
        "" => format!("rule {}", index + 1),
        name => format!("rule {} ({name})", index + 1),
    };
    labelled(label, from)
}

fn labelled(label: String, from: &v1::AccessRule) -> Result<Rule, String> {
    let wrong = |error: String| format!("{label}: {error}");
    let sources = from.from.iter().map(|from| {
        Ok(From {
            identities: list(&from.identities, &from.not_identities, Pattern::identity)?,
            namespaces: list(&from.namespaces, &from.not_namespaces, Pattern::namespace)?,
            accounts: list(&from.service_accounts, &from.not_service_accounts, Pattern::account)?,
        })
    });
    let targets = from.to.iter().map(|to| {
        Ok(To {
            methods: list(&to.methods, &to.not_methods, Pattern::method)?,
            paths: list(&to.paths, &to.not_paths, Pattern::path)?,
            grpc: list(&to.grpc, &to.not_grpc, Pattern::grpc)?,
            models: list(&to.models, &to.not_models, Pattern::model)?,
            ports: ports(&to.ports)?,
            not_ports: ports(&to.not_ports)?,
        })
    });
    let headers = from.headers.iter().map(|header| {
        let name =
            header.name.parse().map_err(|_| format!("{:?} is not the name of a header", header.name))?;
        Ok(Header { name, values: list(&header.values, &header.not_values, Pattern::text)? })
    });
    Ok(Rule {
        from: sources.collect::<Result<_, String>>().map_err(wrong)?,
        to: targets.collect::<Result<_, String>>().map_err(wrong)?,
        headers: headers.collect::<Result<_, String>>().map_err(wrong)?,
        label: label.into(),
    })
}

fn list(
    of: &[String],
    not: &[String],
    read: impl Fn(&str) -> Result<Pattern, String>,
) -> Result<List, String> {
    let read = |texts: &[String]| texts.iter().map(|text| read(text)).collect::<Result<_, _>>();
    Ok(List { of: read(of)?, not: read(not)? })
}

fn ports(from: &[u32]) -> Result<Vec<u16>, String> {
    let port = |port: &u32| u16::try_from(*port).map_err(|_| format!("{port} is not a port"));
    from.iter().map(port).collect()
}

#[cfg(test)]
mod tests;
