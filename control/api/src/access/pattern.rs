//! What rules compare with: a text, or the beginning of one.

use crate::SpiffeId;
use crate::path;

/// A text, or with `*` at its end all that begin like it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// This one.
    Exact(Box<str>),
    /// Whatever begins so.
    Prefix(Box<str>),
    /// This one, and what is below it: with a `/` behind it.
    Below(Box<str>),
}

impl Pattern {
    /// A text that may end with `*`.
    pub fn text(text: &str) -> Result<Self, String> {
        let (begin, open) = match text.strip_suffix('*') {
            Some(begin) => (begin, true),
            None => (text, false),
        };
        if text.is_empty() || begin.contains('*') {
            return Err(format!("{text:?}: write the whole text, or its beginning and one `*` at the end"));
        }
        Ok(if open { Self::Prefix(begin.into()) } else { Self::Exact(begin.into()) })
    }

    /// `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`, or the beginning of one and `*`.
    pub fn identity(text: &str) -> Result<Self, String> {
        let pattern = Self::text(text)?;
        match &pattern {
            Self::Exact(id) => drop(id.parse::<SpiffeId>().map_err(|error| error.to_string())?),
            Self::Prefix(begin) if begin.is_empty() || begin.starts_with("spiffe://") => {}
            _ => {
                return Err(format!(
                    "{text:?} is no beginning of an identity: write spiffe://<trust-domain>/ns/…*"
                ));
            }
        }
        Ok(pattern)
    }

    /// `<namespace>/<service-account>`, or `<namespace>/<beginning>*`.
    pub fn account(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, account)) if crate::service::is_label(namespace) && !account.contains('/') => {
                Self::text(account).map(|_| ()).and_then(|()| Self::text(text))
            }
            _ => Err(format!("{text:?}: write <namespace>/<service-account>")),
        }
    }

    /// A path, or `/x/*` for `/x` and all below it.
    pub fn path(text: &str) -> Result<Self, String> {
        let (base, below) = match text.strip_suffix("/*") {
            Some(base) => (base, true),
            None => (text, false),
        };
        if base.contains('*') || !(base.starts_with('/') || below && base.is_empty()) {
            return Err(format!(
                "{text:?}: write a path that begins with `/`, or `/x/*` for /x and all below it"
            ));
        }
        if base.contains(['?', '#']) {
            return Err(format!("{text:?}: a path has no query; that is not looked at"));
        }
        match path::canonical(base) {
            Ok(form) if form == base => {}
            Ok(form) => {
                return Err(format!(
                    "{text:?} would never match: its canonical form is {form:?}; write that"
                ));
            }
            Err(why) => {
                return Err(format!("{text:?} would never match: {why}, and such requests are refused"));
            }
        }
        Ok(if below { Self::Below(base.into()) } else { Self::Exact(base.into()) })
    }

    /// `<service>/<method>`, or `<service>/*`, as the path that gRPC calls have.
    pub fn grpc(text: &str) -> Result<Self, String> {
        let part = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_'))
        };
        match text.split_once('/') {
            Some((service, "*")) if part(service) => Ok(Self::Below(format!("/{service}").into())),
            Some((service, method)) if part(service) && part(method) => {
                Ok(Self::Exact(format!("/{text}").into()))
            }
            _ => Err(format!("{text:?}: write <package>.<Service>/<Method>, or <package>.<Service>/*")),
        }
    }

    /// A model: with all its versions and adapters, `name/…`, unless one is named. `llama*` are all that begin so.
    pub fn model(text: &str) -> Result<Self, String> {
        Ok(match Self::text(text)? {
            Self::Exact(name) => Self::Below(name),
            other => other,
        })
    }

    /// A method: one token, in capitals.
    pub fn method(text: &str) -> Result<Self, String> {
        match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-') {
            true => Ok(Self::Exact(text.into())),
            false => Err(format!("{text:?}: write a method in capitals, such as GET")),
        }
    }

    /// A namespace, or the beginning of its name and `*`.
    pub fn namespace(text: &str) -> Result<Self, String> {
        let pattern = Self::text(text)?;
        let name = text.trim_end_matches('*').trim_end_matches('-');
        match name.is_empty() || crate::service::is_label(name) {
            true => Ok(pattern),
            false => Err(format!("{text:?} is not the name of a namespace")),
        }
    }

    /// Whether it is that text.
    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => text == exact.as_bytes(),
            Self::Prefix(begin) => text.starts_with(begin.as_bytes()),
            Self::Below(base) => {
                text.strip_prefix(base.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
            }
        }
    }

    /// Whether it is that service account.
    pub(super) fn matches_account(&self, namespace: &str, account: &str) -> bool {
        let (Self::Exact(text) | Self::Prefix(text) | Self::Below(text)) = self;
        let Some((of, name)) = text.split_once('/') else { return false };
        let same = match self {
            Self::Exact(_) | Self::Below(_) => account == name,
            Self::Prefix(_) => account.starts_with(name),
        };
        of == namespace && same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_not_mean_what_it_says_is_refused() {
        type Read = fn(&str) -> Result<Pattern, String>;
        let table: [(Read, &str, bool); 34] = [
            (Pattern::identity, "spiffe://cluster.local/ns/a/sa/b", true),
            (Pattern::identity, "spiffe://cluster.local/ns/a/*", true),
            (Pattern::identity, "*", true),
            (Pattern::identity, "cluster.local/ns/a/sa/b", false),
            (Pattern::identity, "spiffe://*/ns/a/sa/b", false),
            (Pattern::identity, "ns/*", false),
            (Pattern::account, "web/front", true),
            (Pattern::account, "web/*", true),
            (Pattern::account, "front", false),
            (Pattern::account, "*/front", false),
            (Pattern::account, "web/a/b", false),
            (Pattern::path, "/v2/models/*", true),
            (Pattern::path, "/*", true),
            (Pattern::path, "/", true),
            (Pattern::path, "/a*", false),
            (Pattern::path, "/a/*/b", false),
            (Pattern::path, "a", false),
            (Pattern::path, "*", false),
            (Pattern::path, "/a//b", false),
            (Pattern::path, "/a/../b", false),
            (Pattern::path, "/a%2Fb", false),
            (Pattern::path, "/%61", false),
            (Pattern::path, "/a?b", false),
            (Pattern::grpc, "inference.GRPCInferenceService/ModelInfer", true),
            (Pattern::grpc, "inference.GRPCInferenceService/*", true),
            (Pattern::grpc, "inference.GRPCInferenceService", false),
            (Pattern::grpc, "/a.B/C", false),
            (Pattern::grpc, "a.B/C*", false),
            (Pattern::method, "GET", true),
            (Pattern::method, "get", false),
            (Pattern::method, "*", false),
            (Pattern::namespace, "team-*", true),
            (Pattern::namespace, "Team", false),
            (Pattern::model, "", false),
        ];
        for (read, text, good) in table {
            assert_eq!(read(text).is_ok(), good, "{text}: {:?}", read(text));
        }
    }

    #[test]
    fn a_path_and_what_is_below_it() {
        let admin = Pattern::path("/admin/*").unwrap();
        let matching = ["/admin", "/admin/", "/admin/x/y"];
        let others = ["/administrator", "/", "/x/admin", "/Admin"];
        assert!(matching.iter().all(|path| admin.matches(path.as_bytes())));
        assert!(!others.iter().any(|path| admin.matches(path.as_bytes())));
        assert!(Pattern::path("/*").unwrap().matches(b"/anything"));
        assert!(!Pattern::path("/*").unwrap().matches(b"*"), "OPTIONS * is no path");
        let model = Pattern::model("digits").unwrap();
        assert!(model.matches(b"digits") && model.matches(b"digits/2") && !model.matches(b"digits2"));
        let version = Pattern::model("digits/2").unwrap();
        assert!(
            version.matches(b"digits/2") && !version.matches(b"digits") && !version.matches(b"digits/20")
        );
    }
}
