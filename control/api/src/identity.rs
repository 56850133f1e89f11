//! Workload identities: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::service::is_label;

/// A SPIFFE id in Penstock's form. Parsing checks the form; it does not prove anything.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<str>);

/// Why a text is no SPIFFE id of the mesh.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an identity: write spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
pub struct InvalidSpiffeId(String);

impl SpiffeId {
    /// The id of a service account.
    pub fn new(trust_domain: &str, namespace: &str, account: &str) -> Result<Self, InvalidSpiffeId> {
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Trust domain, namespace, service account.
    pub fn parts(&self) -> (&str, &str, &str) {
        split(&self.0).unwrap_or(("", "", ""))
    }
}

fn split(uri: &str) -> Option<(&str, &str, &str)> {
    let (domain, path) = uri.strip_prefix("spiffe://")?.split_once("/ns/")?;
    let (namespace, account) = path.split_once("/sa/")?;
    Some((domain, namespace, account))
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        // Dots are legal in the names of service accounts and in trust domains (RFC 1123 subdomains).
        let subdomain = |text: &str| text.len() <= 253 && text.split('.').all(is_label);
        match split(uri) {
            Some((domain, namespace, account))
                if subdomain(domain) && is_label(namespace) && subdomain(account) =>
            {
                Ok(Self(uri.into()))
            }
            _ => Err(InvalidSpiffeId(uri.to_owned())),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_mesh_form_is_an_identity() {
        assert_eq!(
            SpiffeId::new("cluster.local", "team-a", "resnet").map(|id| id.to_string()),
            Ok("spiffe://cluster.local/ns/team-a/sa/resnet".to_owned())
        );
        for bad in [
            "",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://CLUSTER.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/../sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
