//! Where objects come from.
//!
//! A source is nothing but a channel that always holds the newest [`ObjectSet`]: a directory today, a watch of the
//! Kubernetes API later. It decides nothing about the objects.

pub mod directory;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use penstock_api::names::DEFAULT_TRUST_DOMAIN;
use penstock_api::view::Problem;
use tokio::sync::watch;

use crate::compile::{State, TrustAnchors, compile};
use crate::objects::ObjectSet;

/// A source, as `--source` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `dir:PATH`: the YAML files of a directory and its subdirectories.
    Directory(PathBuf),
}

/// Why a text names no source.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a source is written dir:PATH, here dir:{0}")]
pub struct InvalidSource(String);

impl FromStr for Source {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
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
    pub async fn open(&self, debounce: Duration) -> Result<watch::Receiver<Arc<ObjectSet>>> {
        match self {
            Self::Directory(path) => directory::open(path.clone(), debounce).await,
        }
    }
}

/// Everything that is wrong with the objects of a directory, as if none of them had ever been in force.
pub fn check_dir(path: &Path) -> Vec<Problem> {
    let trust = TrustAnchors { trust_domain: DEFAULT_TRUST_DOMAIN.to_owned(), anchors: Vec::new() };
    compile(&directory::read(path), &State::default(), &trust).0.problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_named_by_kind_and_place() {
        assert_eq!("dir:/a/b".parse(), Ok(Source::Directory("/a/b".into())));
        for bad in ["", "dir:", "/a/b", "kubernetes"] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }
}
