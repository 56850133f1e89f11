//! The model that a path names, and the parts of a request that say whether its body may name one.

use http::Method;

use super::Model;

/// The service of the Open Inference Protocol, as the beginning of its calls' paths.
pub const OIP: &str = "/inference.GRPCInferenceService/";

/// What a request says of its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// It is about none.
    No,
    /// `name`, `name/version` or `name/adapter`.
    As(String),
    /// It may be about one.
    Unknown,
}

impl Named {
    /// As a fact.
    pub fn fact(&self) -> Model<'_> {
        match self {
            Self::No => Model::None,
            Self::As(name) => Model::Named(name),
            Self::Unknown => Model::Unknown,
        }
    }

    /// What method and canonical path alone say; `None`: the body says it, if anything does.
    pub fn in_path(method: &Method, path: &str) -> Option<Self> {
        // A tunnel can say anything.
        if *method == Method::CONNECT {
            return Some(Self::Unknown);
        }
        if let Some((_, rest)) = path.split_once("/v2/models/") {
            let mut parts = rest.split('/');
            let name = parts.next().unwrap_or_default();
            return Some(named(
                name,
                parts.next().filter(|part| *part == "versions").and_then(|_| parts.next()),
            ));
        }
        if let Some((_, rest)) = path.split_once("/v1/models/") {
            return Some(named(rest.trim_end_matches('/'), None));
        }
        match path.strip_prefix(OIP) {
            Some("ServerLive" | "ServerReady" | "ServerMetadata") => Some(Self::No),
            Some(_) => None,
            None => matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS).then_some(Self::No),
        }
    }
}

fn named(name: &str, version: Option<&str>) -> Named {
    let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8().ok();
    match (decoded(name), version.map(decoded)) {
        (Some(name), _) if name.is_empty() => Named::No,
        (Some(name), None) => Named::As(name.into_owned()),
        (Some(name), Some(Some(version))) => Named::As(format!("{name}/{version}")),
        _ => Named::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_path_names_a_model() {
        let named = |text: &str| Some(Named::As(text.to_owned()));
        let table = [
            (Method::POST, "/v2/models/m/infer", named("m")),
            (Method::GET, "/v2/models/m/ready", named("m")),
            (Method::GET, "/v2/models/m", named("m")),
            (Method::POST, "/x/v2/models/m/versions/2/infer", named("m/2")),
            (Method::POST, "/v2/models/a%22b/infer", named("a\"b")),
            (Method::GET, "/v2/health/ready", Some(Named::No)),
            (Method::GET, "/v1/models", Some(Named::No)),
            (Method::GET, "/v1/models/org/m", named("org/m")),
            (Method::POST, "/v1/chat/completions", None),
            (Method::CONNECT, "", Some(Named::Unknown)),
            (Method::POST, "/inference.GRPCInferenceService/ModelInfer", None),
            (Method::GET, "/inference.GRPCInferenceService/ModelInfer", None),
            (Method::POST, "/inference.GRPCInferenceService/ServerLive", Some(Named::No)),
        ];
        for (method, path, expected) in table {
            assert_eq!(Named::in_path(&method, path), expected, "{method} {path}");
        }
    }
}
