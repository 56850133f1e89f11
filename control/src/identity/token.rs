//! Bearer tokens: how a workload proves who it is before it has a certificate.
//!
//! In: a token and the time. Out: the namespace and service account that it proves, or the reason why it proves
//! nothing. [`TokenReview`] is the seam: with a directory as source, tokens are what [`TokenKey`] signed; with
//! Kubernetes, its TokenReview API stands behind the same trait.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::state::{Readers, StateDir, StateError};

/// The file with the key that tokens are signed with.
const KEY_FILE: &str = "token.key";
/// What a token begins with; part of what is signed.
const PREFIX: &str = "penstock-v1";
/// A token has three short names and a number; more is no token.
const MAX_TOKEN: usize = 4_096;

/// Who a token speaks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The namespace.
    #[serde(rename = "ns")]
    pub namespace: String,
    /// The service account.
    #[serde(rename = "sa")]
    pub account: String,
    /// The pod, if the token is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// Why a token proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It has not the form of a token.
    #[error("the token is malformed: {0}; make one with `penstock-control token`")]
    Malformed(&'static str),
    /// It was signed with another key.
    #[error("the token was not issued by this control plane; make one with its own --state directory")]
    NotOurs,
    /// It was good once.
    #[error("the token of {account} in {namespace} expired {ago} s ago; put a fresh one into the token file")]
    Expired {
        /// Of the token.
        namespace: String,
        /// Of the token.
        account: String,
        /// Seconds since it expired.
        ago: i64,
    },
    /// Who was asked does not accept it.
    #[error("the token is not accepted: {0}")]
    Refused(String),
    /// The reviewer could not be asked.
    #[error("the token could not be checked: {0}; trying again may help")]
    Unavailable(String),
}

impl TokenError {
    /// The word on the metric of refused tokens.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::NotOurs => "not-ours",
            Self::Expired { .. } => "expired",
            Self::Refused(_) => "refused",
            Self::Unavailable(_) => "unavailable",
        }
    }
}

/// Says who a token speaks for.
pub trait TokenReview: std::fmt::Debug + Send + Sync + 'static {
    /// Checks a token at `now`, seconds since the epoch.
    fn check<'a>(&'a self, token: &'a str, now: i64) -> BoxFuture<'a, Result<Workload, TokenError>>;
}

/// The key that signs and checks tokens in directory mode.
#[derive(Clone)]
pub struct TokenKey([u8; 32]);

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

#[derive(Serialize, Deserialize)]
struct Claims {
    #[serde(flatten)]
    workload: Workload,
    exp: i64,
}

impl TokenKey {
    /// Reads the key of a state directory, making it on the first use.
    pub fn open(state: &StateDir) -> Result<Self, StateError> {
        let fresh: [u8; 32] = rand::random();
        let key = match state.read(KEY_FILE)? {
            Some(key) => key,
            None => state.write_once(KEY_FILE, &fresh, Readers::Owner)?,
        };
        // Any length is stretched to a key, so that an operator's own secret works as well.
        Ok(Self(blake3::derive_key("penstock 2026 bearer tokens", &key)))
    }

    /// Signs a token that is good until `expires`, seconds since the epoch.
    pub fn issue(&self, workload: Workload, expires: i64) -> Result<String, serde_json::Error> {
        let claims = serde_json::to_vec(&Claims { workload, exp: expires })?;
        let signed = format!("{PREFIX}.{}", URL_SAFE_NO_PAD.encode(claims));
        let mac = blake3::keyed_hash(&self.0, signed.as_bytes());
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.as_bytes())))
    }

    /// Checks a token at `now`.
    pub fn check_at(&self, token: &str, now: i64) -> Result<Workload, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Malformed("it is longer than any token"));
        }
        let malformed = TokenError::Malformed("it is not three parts joined by dots");
        let (signed, mac) = token.rsplit_once('.').ok_or(malformed.clone())?;
        let (prefix, claims) = signed.split_once('.').ok_or(malformed.clone())?;
        if prefix != PREFIX {
            return Err(malformed);
        }
        let mac: [u8; 32] = URL_SAFE_NO_PAD
            .decode(mac)
            .ok()
            .and_then(|mac| mac.try_into().ok())
            .ok_or(TokenError::Malformed("its signature is cut or not base64"))?;
        // Hashes compare in constant time.
        if blake3::keyed_hash(&self.0, signed.as_bytes()) != blake3::Hash::from_bytes(mac) {
            return Err(TokenError::NotOurs);
        }
        let claims: Claims = URL_SAFE_NO_PAD
            .decode(claims)
            .ok()
            .and_then(|claims| serde_json::from_slice(&claims).ok())
            .ok_or(TokenError::Malformed("its claims cannot be read"))?;
        if claims.exp <= now {
            let Workload { namespace, account, .. } = claims.workload;
            return Err(TokenError::Expired { namespace, account, ago: now - claims.exp });
        }
        Ok(claims.workload)
    }
}

impl TokenReview for TokenKey {
    fn check<'a>(&'a self, token: &'a str, now: i64) -> BoxFuture<'a, Result<Workload, TokenError>> {
        Box::pin(std::future::ready(self.check_at(token, now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload { namespace: "team-a".into(), account: "resnet".into(), pod: Some("resnet-0".into()) }
    }

    #[test]
    fn a_token_proves_its_workload_until_it_expires() {
        let key = TokenKey([7; 32]);
        let token = key.issue(workload(), 1_000).unwrap();
        assert_eq!(key.check_at(&token, 999), Ok(workload()));
        let error = key.check_at(&token, 1_060).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the token of resnet in team-a expired 60 s ago; put a fresh one into the token file"
        );
    }

    #[test]
    fn a_token_that_was_touched_or_signed_elsewhere_proves_nothing() {
        let key = TokenKey([7; 32]);
        let token = key.issue(workload(), 1_000).unwrap();
        assert_eq!(TokenKey([8; 32]).check_at(&token, 0), Err(TokenError::NotOurs));
        let (signed, mac) = token.rsplit_once('.').unwrap();
        let (_, claims) = signed.split_once('.').unwrap();
        let mut other: serde_json::Value =
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        other["sa"] = "admin".into();
        let forged = format!("{PREFIX}.{}.{mac}", URL_SAFE_NO_PAD.encode(other.to_string()));
        assert_eq!(key.check_at(&forged, 0), Err(TokenError::NotOurs));
        for bad in ["", "x", "a.b.c", "penstock-v1.e30", &token[..token.len() - 4], &"x".repeat(5_000)] {
            assert!(matches!(key.check_at(bad, 0), Err(TokenError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn the_key_stays_the_same_over_starts() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let token = TokenKey::open(&state).unwrap().issue(workload(), 1_000).unwrap();
        assert_eq!(TokenKey::open(&state).unwrap().check_at(&token, 0), Ok(workload()));
        assert!(!super::super::state::is_exposed(&state.path(KEY_FILE)));
    }
}
