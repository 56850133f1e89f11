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
        // Servers that cut it elsewhere would find another name.
        let marks = path.matches("/v2/models/").count() + path.matches("/v1/models/").count();
        if marks > 1 || (marks == 1 && path.contains(';')) {
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
            return Some(of_v1(rest.trim_end_matches('/')));
        }
        match path.strip_prefix(OIP) {
            Some("ServerLive" | "ServerReady" | "ServerMetadata") => Some(Self::No),
            Some(_) => None,
            None => match *method {
                Method::GET | Method::HEAD | Method::OPTIONS if ABOUT_NONE.contains(&path) => Some(Self::No),
                // Of an API that is not known.
                Method::GET | Method::HEAD | Method::OPTIONS => Some(Self::Unknown),
                _ => None,
            },
        }
    }
}

/// What is asked of servers without a model: health, metrics, what there is.
const ABOUT_NONE: [&str; 16] = [
    "/",
    "/favicon.ico",
    "/health",
    "/healthz",
    "/livez",
    "/metrics",
    "/ping",
    "/readyz",
    "/v1/models",
    "/v2",
    "/v2/",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models",
    "/v2/models/stats",
    "/version",
];

/// TensorFlow Serving's and KServe's first protocol: `m`, `m:predict`, `m/versions/2:predict`, `m/labels/l:predict`; and OpenAI's
/// `org/m`.
fn of_v1(rest: &str) -> Named {
    let (rest, verb) = rest.rsplit_once(':').map_or((rest, None), |(rest, verb)| (rest, Some(verb)));
    if verb.is_some_and(|verb| verb.is_empty() || verb.contains('/')) || rest.contains(':') {
        return Named::Unknown;
    }
    if let Some((name, version)) = rest.split_once("/versions/") {
        return named(name, Some(version));
    }
    match rest.split_once("/labels/") {
        // Which version it is, the server knows.
        Some((name, _)) => named(name, None),
        None => named(rest.strip_suffix("/metadata").unwrap_or(rest), None),
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
            (Method::POST, "/v1/models/m:predict", named("m")),
            (Method::POST, "/v1/models/m/versions/2:predict", named("m/2")),
            (Method::POST, "/v1/models/m/labels/stable:predict", named("m")),
            (Method::POST, "/v1/models/m:a:b", Some(Named::Unknown)),
            (Method::POST, "/v2/models/m;x/infer", Some(Named::Unknown)),
            (Method::POST, "/a/v2/models/x/v2/models/m/infer", Some(Named::Unknown)),
            (Method::GET, "/predictions/m", Some(Named::Unknown)),
            (Method::GET, "/metrics", Some(Named::No)),
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
