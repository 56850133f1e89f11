//! Certificates that lie in objects of the cluster: read, and how long they are good.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

use super::{Check, Verdict};
use crate::cluster::text;
use crate::units;

/// Less of its life than this left, and whoever renews it does not: control does at two thirds.
const SHARE_LEFT: f64 = 1.0 / 12.0;

/// A certificate.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Held {
    pub subject: String,
    pub issuer: String,
    pub not_before: i64,
    pub not_after: i64,
    /// Whether it may sign others.
    pub authority: bool,
    /// DNS names.
    pub names: Vec<String>,
    /// Its own key's identifier, and its issuer's; empty: it tells none.
    key: Vec<u8>,
    signed_by: Vec<u8>,
}

/// All certificates of a PEM text.
pub(super) fn read(pem: &[u8]) -> Vec<Held> {
    Pem::iter_from_buffer(pem).filter_map(|block| held(&block.ok()?)).collect()
}

/// All certificates of a key of a Secret.
pub(super) fn of_secret(secret: &Value, key: &str) -> Vec<Held> {
    of_base64(text(secret, &format!("/data/{key}")))
}

/// All certificates of a PEM text in base64.
pub(super) fn of_base64(text: &str) -> Vec<Held> {
    STANDARD.decode(text).map(|pem| read(&pem)).unwrap_or_default()
}

fn held(block: &Pem) -> Option<Held> {
    let certificate = block.parse_x509().ok()?;
    let names = certificate.subject_alternative_name().ok().flatten().map(|names| {
        let dns = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        });
        dns.collect()
    });
    let (mut key, mut signed_by) = (Vec::new(), Vec::new());
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier(id) => key = id.0.to_vec(),
            x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => {
                signed_by = id.key_identifier.as_ref().map(|id| id.0.to_vec()).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(Held {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        authority: certificate.is_ca(),
        names: names.unwrap_or_default(),
        key,
        signed_by,
    })
}

/// Whether `authority` is who `certificate` says that signed it, by name and, where both tell it, by key.
pub(super) fn signs(authority: &Held, certificate: &Held) -> bool {
    let keys = authority.key.is_empty()
        || certificate.signed_by.is_empty()
        || authority.key == certificate.signed_by;
    authority.subject == certificate.issuer && keys
}

/// How much of its life is left.
pub(super) fn life(check: &'static str, certificate: &Held, now: f64, fix: &str) -> Check {
    let lifetime = (certificate.not_after - certificate.not_before).max(1) as f64;
    let left = certificate.not_after as f64 - now;
    if left < 0.0 {
        let found = format!("it ended {} ago", units::age(-left));
        return Check::bad(Verdict::Problem, check, found, Vec::new(), fix);
    }
    if (certificate.not_before as f64) > now {
        let found = format!("it is not good for another {}", units::age(certificate.not_before as f64 - now));
        return Check::bad(
            Verdict::Problem,
            check,
            found,
            Vec::new(),
            "Look at the clocks of the nodes: date",
        );
    }
    let found = format!("{} of {} left", units::age(left), units::age(lifetime));
    if left < lifetime * SHARE_LEFT {
        return Check::bad(Verdict::Warning, check, found, Vec::new(), fix);
    }
    Check::ok(check, found)
}
