//! Which models and adapters a model server has loaded, so that a request goes where its model is.
//!
//! Inbound asks the server (vLLM's `/v1/models`; it refuses what it has not loaded, others answer whatever they are asked for)
//! and tells other sidecars in a header, as hashes: a report has numbers and no names. Outbound believes it when it
//! chooses ([`Candidate::serves`](penstock_balance::Candidate::serves)). What can go wrong: a server that cannot be asked, or
//! has more than [`MOST`]; then nothing is told, and it is taken to have everything.

use std::fmt::Write as _;
use std::time::Duration;

use http::HeaderValue;
use serde::Deserialize;

/// Where vLLM says it.
pub const PAGE: &str = "/v1/models";
/// The most that are told: about a kilobyte of header.
pub const MOST: usize = 64;
/// How long a list is believed. It is told with each response of a new second, so this is for endpoints that get none; an
/// old list costs no more than none.
pub const BELIEVED: Duration = Duration::from_secs(300);

/// What is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Sorted.
    hashes: Box<[u64]>,
}

impl Loaded {
    /// Reads vLLM's page. `None`: it is something else, or too much to tell.
    pub fn of_page(page: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Page {
            data: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            id: String,
        }
        let page: Page = serde_json::from_slice(page).ok()?;
        Self::new(page.data.iter().map(|entry| hash(&entry.id)).collect())
    }

    /// Reads the header between sidecars.
    pub fn of_header(value: &HeaderValue) -> Option<Self> {
        let hash = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok())?;
        let words = value.to_str().ok()?.split(',').take(MOST + 1);
        Self::new(words.map(hash).collect::<Option<_>>()?)
    }

    fn new(mut hashes: Vec<u64>) -> Option<Self> {
        hashes.sort_unstable();
        hashes.dedup();
        (1..=MOST).contains(&hashes.len()).then(|| Self { hashes: hashes.into() })
    }

    /// As the header between sidecars.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let mut text = String::with_capacity(self.hashes.len() * 17);
        for hash in &self.hashes {
            let comma = if text.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(text, "{comma}{hash:016x}");
        }
        HeaderValue::try_from(text).ok()
    }

    /// Whether the model of that [`hash`] is loaded.
    pub fn has(&self, model: u64) -> bool {
        self.hashes.binary_search(&model).is_ok()
    }
}

/// A model's or an adapter's name as a number, the same in every sidecar and never 0.
pub fn hash(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    hash.as_bytes().first_chunk().map_or(1, |first| u64::from_le_bytes(*first)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(names: &[String]) -> Vec<u8> {
        let data: Vec<_> =
            names.iter().map(|name| serde_json::json!({"id": name, "object": "model"})).collect();
        serde_json::to_vec(&serde_json::json!({"object": "list", "data": data})).unwrap()
    }

    #[test]
    fn what_a_page_lists_is_told_and_believed() {
        let loaded = Loaded::of_page(&page(&["meta/llama".into(), "sql-adapter".into()])).unwrap();
        assert!(loaded.has(hash("meta/llama")) && loaded.has(hash("sql-adapter")));
        assert!(!loaded.has(hash("meta/llama-2")) && !loaded.has(0));
        assert_eq!(Loaded::of_header(&loaded.to_header().unwrap()), Some(loaded));
    }

    #[test]
    fn what_is_no_list_tells_nothing() {
        for bad in ["", "{}", "[]", "{\"data\":[]}", "{\"data\":[{\"name\":\"x\"}]}", "<html>"] {
            assert_eq!(Loaded::of_page(bad.as_bytes()), None, "{bad}");
        }
        for bad in ["", ",", "1", "zzzzzzzzzzzzzzzz", "0123456789abcdef,"] {
            let value = HeaderValue::from_static(bad);
            assert_eq!(Loaded::of_header(&value), None, "{bad}");
        }
    }

    #[test]
    fn a_list_has_an_end() {
        let names: Vec<String> = (0..=MOST).map(|i| format!("adapter-{i}")).collect();
        let most = Loaded::of_page(&page(&names[1..])).unwrap();
        let header = most.to_header().unwrap();
        assert!(header.len() < 1100 && Loaded::of_header(&header) == Some(most));
        assert_eq!(Loaded::of_page(&page(&names)), None, "more than can be told");
        let long = format!("{},0123456789abcdef", header.to_str().unwrap());
        assert_eq!(Loaded::of_header(&HeaderValue::try_from(long).unwrap()), None);
    }
}
