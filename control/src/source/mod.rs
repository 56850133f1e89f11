//! Where objects come from.
//!
//! A source is nothing but a channel that always holds the newest [`ObjectSet`]: of a directory, or of the Kubernetes API. It decides
//! nothing about the objects.

pub mod directory;
pub mod kubernetes;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use penstock_api::names::DEFAULT_TRUST_DOMAIN;
use penstock_api::view::Problem;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::compile::{State, TrustAnchors, compile};
use crate::identity::review::ApiReview;
use crate::identity::token::TokenReview;
use crate::objects::ObjectSet;

/// A source, as `--source` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `dir:PATH`: the YAML files of a directory and its subdirectories.
    Directory(PathBuf),
    /// `kubernetes` or `kubernetes:CONTEXT`: the API of the cluster that this runs in, or that the kubeconfig names.
    Kubernetes(Option<String>),
}

/// A source that is followed.
#[derive(Clone)]
pub struct Opened {
    /// What it knows.
    pub objects: watch::Receiver<Arc<ObjectSet>>,
    /// Who says whom a bearer token speaks for, where the source knows.
    pub review: Option<Arc<dyn TokenReview>>,
    /// Speaks to the API that it comes from, if it comes from one.
    pub client: Option<kube::Client>,
    /// The host of that API, as it is found from here.
    pub api_server: Option<String>,
    /// What that API has in the statuses of objects.
    pub statuses: kubernetes::Statuses,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("review", &self.review).finish_non_exhaustive()
    }
}

/// Why a text names no source.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a source is written dir:PATH, here dir:{0}, or kubernetes, or kubernetes:CONTEXT")]
pub struct InvalidSource(String);

impl FromStr for Source {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "kubernetes" => return Ok(Self::Kubernetes(None)),
            Some(("kubernetes", context)) if !context.is_empty() => {
                return Ok(Self::Kubernetes(Some(context.to_owned())));
            }
            _ => {}
        }
        match text.strip_prefix("dir:") {
            Some(path) if !path.is_empty() => Ok(Self::Directory(path.into())),
            Some(_) => Err(InvalidSource("manifests".to_owned())),
            None => Err(InvalidSource(if text.is_empty() { "manifests" } else { text }.to_owned())),
        }
    }
}

impl Source {
    /// Reads everything once, so that nobody ever sees an empty start, and goes on watching in the background until
    /// every receiver is gone. `debounce`: how long the source must be quiet before it is read again.
    pub async fn open(&self, debounce: Duration) -> Result<Opened> {
        match self {
            Self::Directory(path) => {
                let objects = directory::open(path.clone(), debounce).await?;
                let statuses = kubernetes::Statuses::default();
                Ok(Opened { objects, review: None, client: None, api_server: None, statuses })
            }
            Self::Kubernetes(context) => {
                let config = kubernetes::config(context.as_deref()).await?;
                let api_server =
                    config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
                let client = kubernetes::client_of(config)?;
                let review: Arc<dyn TokenReview> = Arc::new(ApiReview::new(client.clone()));
                let (objects, statuses) = kubernetes::open(client.clone(), debounce).await?;
                Ok(Opened { objects, review: Some(review), client: Some(client), api_server, statuses })
            }
        }
    }
}

/// A source that never comes to rest is read anyway after so many debounces.
const PATIENCE: u32 = 20;

/// Returns once nothing has happened for `debounce`, or after [`PATIENCE`].
async fn quiet(changed: &Notify, debounce: Duration) {
    let end = Instant::now() + debounce * PATIENCE;
    loop {
        let deadline = (Instant::now() + debounce).min(end);
        if timeout_at(deadline, changed.notified()).await.is_err() {
            return;
        }
    }
}

/// Everything that is wrong with the objects of a directory, as if none of them had ever been in force.
pub fn check_dir(path: &Path) -> Vec<Problem> {
    check(&directory::read(path))
}

/// Everything that is wrong with these objects, as if none of them had ever been in force.
pub fn check(objects: &ObjectSet) -> Vec<Problem> {
    let trust = TrustAnchors { trust_domain: DEFAULT_TRUST_DOMAIN.to_owned(), anchors: Vec::new() };
    compile(objects, &State::default(), &trust).0.problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_named_by_kind_and_place() {
        assert_eq!("dir:/a/b".parse(), Ok(Source::Directory("/a/b".into())));
        assert_eq!("kubernetes".parse(), Ok(Source::Kubernetes(None)));
        assert_eq!("kubernetes:kind".parse(), Ok(Source::Kubernetes(Some("kind".into()))));
        for bad in ["", "dir:", "/a/b", "kubernetes:", "kube"] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }
}
