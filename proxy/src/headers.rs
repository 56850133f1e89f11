//! Headers on their way through: what belongs to one hop stays behind, what is ours is not taken from strangers, and
//! what a route's filters ask for is done.

use std::borrow::Cow;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{HeaderMap, Method, Request, Version, request, uri};
use http_body::Body;
use penstock_api::{Reason, names, path, shown};

use crate::config::{HeaderChange, PathChange, Redirect, Rewrite};
use crate::failure::Failure;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// The version that the application spoke, between sidecars.
pub const PROTOCOL: HeaderName = HeaderName::from_static(names::header::PROTOCOL);
/// Who calls, for the application.
pub const CLIENT_ID: HeaderName = HeaderName::from_static(names::header::CLIENT_ID);
/// Who calls, for the application, as Envoy says it.
pub const FORWARDED: HeaderName = HeaderName::from_static(names::header::FORWARDED_CLIENT_CERT);
const FORWARDED_ALIAS: HeaderName = HeaderName::from_static(names::header::FORWARDED_CLIENT_CERT_ALIAS);
/// The endpoint's own word on a response.
pub const ENDPOINT: HeaderName = HeaderName::from_static(names::header::ENDPOINT);
/// Why a proxy answered itself.
pub const ERROR: HeaderName = HeaderName::from_static(names::header::ERROR);
/// The request that is answered has not reached the application.
pub const UNTOUCHED: HeaderName = HeaderName::from_static(names::header::UNTOUCHED);
/// Asks a sidecar for the load of a model.
pub const PROBE: HeaderName = HeaderName::from_static(names::header::PROBE);
/// What a sidecar's application has loaded.
pub const MODELS: HeaderName = HeaderName::from_static(names::header::MODELS);
/// Load report, text.
pub const LOAD_REPORT: HeaderName = HeaderName::from_static(names::header::LOAD_REPORT);
/// Load report, serialised.
pub const LOAD_REPORT_BIN: HeaderName = HeaderName::from_static(names::header::LOAD_REPORT_BIN);
/// Asks to see load reports.
pub const LOAD_REPORT_FORMAT: HeaderName = HeaderName::from_static(names::header::LOAD_REPORT_FORMAT);

/// What a look over the headers found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    connection: bool,
    one_hop: bool,
    te: bool,
    upgrade: bool,
    /// The client asked to see load reports.
    pub wants_report: bool,
    /// A load report.
    pub report: bool,
    /// A header that only a sidecar may send.
    pub ours: bool,
    /// One that begins as ours do, and is none; or one that HTTP/1 has no words for.
    strange: bool,
}

/// Looks over the headers once, so that what is not there costs nothing.
pub fn look(headers: &HeaderMap) -> Found {
    let mut found = Found::default();
    for name in headers.keys() {
        if *name == CONNECTION {
            found.connection = true;
        } else if *name == TRANSFER_ENCODING || *name == KEEP_ALIVE || *name == PROXY_CONNECTION {
            found.one_hop = true;
        } else if *name == TE {
            found.te = true;
        } else if *name == UPGRADE {
            found.upgrade = true;
        } else if *name == LOAD_REPORT_FORMAT {
            found.wants_report = true;
        } else if *name == LOAD_REPORT || *name == LOAD_REPORT_BIN {
            found.report = true;
        } else if *name == PROTOCOL
            || *name == CLIENT_ID
            || *name == ENDPOINT
            || *name == ERROR
            || *name == UNTOUCHED
            || *name == PROBE
            || *name == MODELS
            || *name == FORWARDED
            || *name == FORWARDED_ALIAS
        {
            found.ours = true;
        } else if is_strange(name) {
            found.strange = true;
        }
    }
    found
}

/// Whether a name is kept for headers of ours that there may be one day: what a client says under it must not mean
/// anything then. Or it is no token (RFC 9110, 5.1), which `http` lets pass in one case, over HTTP/2.
fn is_strange(name: &HeaderName) -> bool {
    let name = name.as_str();
    if name.contains('"') {
        return true;
    }
    // Many servers take an underscore for a hyphen (CGI, WSGI).
    if name.contains('_') {
        let name = name.replace('_', "-");
        return name.starts_with(names::HEADER_PREFIX) || FORWARDED == *name || FORWARDED_ALIAS == *name;
    }
    name.starts_with(names::HEADER_PREFIX) && !names::ASKED.contains(&name)
}

/// Whether the request names more than one host, which peers would read differently (RFC 9112, 3.2: answer 400).
fn ambiguous_host(headers: &HeaderMap) -> bool {
    // The map knows at once when no name repeats.
    headers.len() != headers.keys_len() && headers.get_all(HOST).iter().nth(1).is_some()
}

/// Whether a body is coded in any other way than in chunks, once. hyper takes off the chunks and nothing else, and what is left would
/// travel on as if it were plain (RFC 9112, 6.1).
fn is_coded(headers: &HeaderMap, found: Found) -> bool {
    if !found.one_hop {
        return false;
    }
    let values =
        headers.get_all(TRANSFER_ENCODING).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    let mut codings = values.map(<[u8]>::trim_ascii).filter(|coding| !coding.is_empty());
    codings.next().is_some_and(|coding| !coding.eq_ignore_ascii_case(b"chunked")) || codings.next().is_some()
}

/// Refuses a request that two servers could take for different ones.
pub fn check_request(request: &request::Parts, found: Found) -> Result<(), Failure> {
    if ambiguous_host(&request.headers) {
        return Err(Failure::unprocessed(Reason::BadRequest, "the request names two hosts"));
    }
    if is_coded(&request.headers, found) {
        return Err(Failure::unprocessed(
            Reason::BadRequest,
            "the body's transfer-encoding is more than chunked once, and no server here takes more off",
        ));
    }
    check_form(request)
}

/// Refuses a target that is not of its method: only CONNECT names an authority alone, and only OPTIONS asks for `*` (RFC 9112, 3.2).
/// Servers read the others each in their own way.
fn check_form(request: &request::Parts) -> Result<(), Failure> {
    let (method, uri) = (&request.method, &request.uri);
    let alone = uri.authority().is_some() && uri.scheme().is_none();
    let fits = match *method {
        Method::CONNECT => uri.authority().is_some(),
        Method::OPTIONS => !alone,
        _ => !alone && uri.path() != "*",
    };
    if fits {
        return Ok(());
    }
    Err(Failure::unprocessed(
        Reason::BadRequest,
        format!(
            "{} is not asked of {}; name a path, and to CONNECT a host and a port",
            shown(method.as_str()),
            shown(&uri.to_string())
        ),
    ))
}

/// Refuses an answer that is coded so: its client would be given what it cannot read.
pub fn check_answer(headers: &HeaderMap, found: Found) -> Result<(), Failure> {
    if !is_coded(headers, found) {
        return Ok(());
    }
    let story = "the server's transfer-encoding is more than chunked once, and nobody here takes more off";
    Err(Failure::new(Reason::UpstreamProtocol, story))
}

/// HTTP/2 may send a cookie in pieces; HTTP/1 wants it whole (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.len() == headers.keys_len() || headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let pieces: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(whole) = HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

/// Whether the message asks to become another protocol (`Connection: upgrade` names the header `Upgrade`).
pub fn asks_upgrade(headers: &HeaderMap, found: Found) -> bool {
    // HTTP/2 by Upgrade is no more (RFC 9113, 3.1), and requests in it would be seen by nobody. A protocol may have a
    // version (RFC 9110, 7.8), and what is no token beside it must not hide it.
    let h2c = |value: &HeaderValue| {
        let mut words = value.as_bytes().split(|byte| matches!(byte, b',' | b'/' | b' ' | b'\t' | b';'));
        words.any(|word| word.eq_ignore_ascii_case(b"h2c")) || !value.as_bytes().is_ascii()
    };
    found.connection
        && found.upgrade
        && tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade"))
        && !headers.get_all(UPGRADE).iter().any(h2c)
}

/// Removes what belongs to the hop it came over (RFC 9110, 7.6.1). `upgrade` keeps the two headers of an Upgrade.
pub fn strip_hop(headers: &mut HeaderMap, found: Found, upgrade: bool) {
    if found.connection {
        let named: Vec<HeaderName> = tokens(headers)
            .filter_map(|token| token.parse().ok())
            // Framing and routing are not the client's to remove.
            .filter(|name| *name != HOST && *name != CONTENT_LENGTH && !(upgrade && *name == UPGRADE))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
        if upgrade {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
    }
    if found.one_hop {
        headers.remove(TRANSFER_ENCODING);
        headers.remove(KEEP_ALIVE);
        headers.remove(PROXY_CONNECTION);
    }
    if found.te {
        // `trailers` is the one value that means something end to end (gRPC requires it).
        let trailers = headers.get(TE).is_some_and(|value| {
            value
                .to_str()
                .is_ok_and(|v| v.split(',').any(|part| part.trim().eq_ignore_ascii_case("trailers")))
        });
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(TE);
        }
    }
    if found.upgrade && !upgrade {
        headers.remove(UPGRADE);
    }
}

/// Removes what only a sidecar may send.
pub fn strip_ours(headers: &mut HeaderMap, found: Found) {
    if found.ours {
        headers.remove(PROTOCOL);
        headers.remove(CLIENT_ID);
        headers.remove(ENDPOINT);
        headers.remove(ERROR);
        headers.remove(UNTOUCHED);
        headers.remove(PROBE);
        headers.remove(MODELS);
        headers.remove(FORWARDED);
        headers.remove(FORWARDED_ALIAS);
    }
    if found.strange {
        let strange: Vec<HeaderName> = headers.keys().filter(|name| is_strange(name)).cloned().collect();
        for name in strange {
            headers.remove(name);
        }
    }
}

/// The same of trailers, and what may not stand there (RFC 9110, 6.5.1): a server that reads them as it reads headers must not take a
/// client's word there either.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    let found = look(trailers);
    strip_hop(trailers, found, false);
    strip_ours(trailers, found);
    for name in [HOST, CONTENT_LENGTH, AUTHORIZATION] {
        trailers.remove(name);
    }
}

fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Applies header filters.
pub fn change(headers: &mut HeaderMap, changes: &[HeaderChange]) {
    for change in changes {
        match change {
            HeaderChange::Set(name, value) => {
                headers.insert(name, value.clone());
            }
            HeaderChange::Add(name, value) => {
                headers.append(name, value.clone());
            }
            HeaderChange::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}

/// How a message has to look for the connection it goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// HTTP/1.1: path in the target, Host header.
    Origin,
    /// HTTP/2: scheme, authority and path in the target.
    Absolute,
}

/// Brings a request into the form of the connection it goes over.
pub fn shape<B>(request: &mut Request<B>, authority: &uri::Authority, form: Form) -> Result<(), Failure> {
    let parts = std::mem::take(request.uri_mut()).into_parts();
    let path = parts.path_and_query.unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
    let bad = |error: http::uri::InvalidUriParts| {
        Failure::unprocessed(Reason::BadRequest, format!("the request's target makes no sense: {error}"))
    };
    match form {
        Form::Origin => {
            if request.version() == Version::HTTP_2 {
                join_cookies(request.headers_mut());
            }
            *request.version_mut() = Version::HTTP_11;
            // CONNECT has no path, only an authority (RFC 9110, 9.3.6).
            if request.method() == Method::CONNECT {
                let mut target = uri::Parts::default();
                target.authority = Some(authority.clone());
                *request.uri_mut() = uri::Uri::from_parts(target).map_err(bad)?;
            } else {
                *request.uri_mut() = uri::Uri::from(path);
            }
            let known = request
                .headers()
                .get(HOST)
                .is_some_and(|host| host.as_bytes() == authority.as_str().as_bytes());
            if !known {
                let host = HeaderValue::from_str(authority.as_str()).map_err(|_| {
                    Failure::unprocessed(Reason::BadRequest, "the request's host is not a header value")
                })?;
                request.headers_mut().insert(HOST, host);
            }
        }
        Form::Absolute => {
            *request.version_mut() = Version::HTTP_2;
            request.headers_mut().remove(HOST);
            let mut target = uri::Parts::default();
            target.authority = Some(authority.clone());
            let plain_connect = request.method() == Method::CONNECT
                && request.extensions().get::<hyper::ext::Protocol>().is_none();
            if !plain_connect {
                target.scheme = Some(uri::Scheme::HTTP);
                target.path_and_query = Some(path);
            }
            *request.uri_mut() = uri::Uri::from_parts(target).map_err(bad)?;
        }
    }
    Ok(())
}

/// Says over HTTP/1.1 that a body follows, where hyper would take it for none: that of a GET or HEAD whose length nobody has said.
pub fn announce<B: Body>(request: &mut Request<B>) {
    let is_odd = matches!(*request.method(), Method::GET | Method::HEAD) && !request.body().is_end_stream();
    if is_odd
        && request.body().size_hint().exact().is_none()
        && !request.headers().contains_key(CONTENT_LENGTH)
    {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Rewrites host and path. `prefix` is what the rule's match covered.
pub fn rewrite<B>(
    request: &mut Request<B>,
    authority: &mut uri::Authority,
    rewrite: &Rewrite,
    prefix: &str,
) -> Result<(), Failure> {
    if let Some(host) = &rewrite.hostname {
        *authority = host.as_bytes().try_into().map_err(|_| {
            Failure::unprocessed(
                Reason::BadRequest,
                "the route rewrites the host to something that is no host",
            )
        })?;
    }
    if let Some(change) = &rewrite.path {
        let path = changed_path(request.uri(), change, prefix);
        let path = uri::PathAndQuery::try_from(path).map_err(|error| {
            Failure::unprocessed(Reason::BadRequest, format!("the rewritten path makes no sense: {error}"))
        })?;
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.path_and_query = Some(path);
        if parts.authority.is_some() && parts.scheme.is_none() {
            parts.scheme = Some(uri::Scheme::HTTP);
        }
        *request.uri_mut() = uri::Uri::from_parts(parts)
            .map_err(|error| Failure::unprocessed(Reason::BadRequest, error.to_string()))?;
    }
    Ok(())
}

/// The `Location` of a redirect.
pub fn location(uri: &uri::Uri, authority: &uri::Authority, redirect: &Redirect, prefix: &str) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or("http");
    let host = redirect.hostname.as_deref().unwrap_or_else(|| authority.host());
    // The port of the request stays unless the scheme changes, whose own port then applies (HTTPRoute, `port`).
    let port = redirect.port.or_else(|| if redirect.scheme.is_some() { None } else { authority.port_u16() });
    let port = port.filter(|port| (scheme, *port) != ("http", 80) && (scheme, *port) != ("https", 443));
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    let path = match &redirect.path {
        Some(change) => changed_path(uri, change, prefix),
        None => uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
    };
    format!("{scheme}://{host}{port}{path}")
}

fn changed_path(uri: &uri::Uri, change: &PathChange, prefix: &str) -> String {
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    match change {
        PathChange::Full(path) => format!("{path}{query}"),
        PathChange::Prefix(new) => {
            let rest = uri.path().strip_prefix(prefix).unwrap_or("");
            let path = format!("{new}{rest}");
            let slash = if path.starts_with('/') { "" } else { "/" };
            format!("{slash}{path}{query}")
        }
    }
}

/// Brings the path of a request into the form that is decided by, for everybody after this.
pub fn settle_path(
    uri: &mut uri::Uri,
    form: fn(&str) -> Result<Cow<'_, str>, path::Ambiguous>,
) -> Result<(), Failure> {
    let bad = |why: &dyn std::fmt::Display| {
        Failure::unprocessed(
            Reason::BadRequest,
            format!(
                "servers read this path differently, so nobody decides by it: {why}; send it in one form"
            ),
        )
    };
    let canonical = match form(uri.path()).map_err(|why| bad(&why))? {
        Cow::Borrowed(_) => return Ok(()),
        Cow::Owned(path) => path,
    };
    let target = match uri.query() {
        Some(query) => format!("{canonical}?{query}"),
        None => canonical,
    };
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(target.try_into().map_err(|error: uri::InvalidUri| bad(&error))?);
    if parts.authority.is_some() && parts.scheme.is_none() {
        parts.scheme = Some(uri::Scheme::HTTP);
    }
    *uri = uri::Uri::from_parts(parts).map_err(|error| bad(&error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.parse::<HeaderName>().unwrap(), v.parse().unwrap())).collect()
    }

    fn stripped(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = headers(pairs);
        let found = look(&map);
        let upgrade = asks_upgrade(&map, found);
        strip_hop(&mut map, found, upgrade);
        strip_ours(&mut map, found);
        map
    }

    #[test]
    fn what_belongs_to_one_hop_stays_behind() {
        let left = stripped(&[
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "x"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("accept", "*/*"),
        ]);
        assert_eq!(left, headers(&[("te", "trailers"), ("accept", "*/*")]));
    }

    #[test]
    fn a_client_cannot_have_framing_removed() {
        let left =
            stripped(&[("connection", "content-length, host"), ("content-length", "3"), ("host", "a")]);
        assert_eq!(left, headers(&[("content-length", "3"), ("host", "a")]));
    }

    #[test]
    fn an_upgrade_keeps_its_headers() {
        let left = stripped(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(left, headers(&[("connection", "upgrade"), ("upgrade", "websocket")]));
    }

    #[test]
    fn two_hosts_are_one_too_many() {
        assert!(!ambiguous_host(&headers(&[("host", "a"), ("x", "1"), ("x", "2")])));
        let mut two = headers(&[("host", "a")]);
        two.append(HOST, "b".parse().unwrap());
        assert!(ambiguous_host(&two));
    }

    #[test]
    fn a_target_has_the_form_of_its_method() {
        let fits = |method: &str, target: &str| {
            let request = http::Request::builder().method(method).uri(target).body(()).unwrap();
            check_form(&request.into_parts().0).is_ok()
        };
        for (method, target) in [
            ("GET", "/"),
            ("GET", "http://a/"),
            ("OPTIONS", "*"),
            ("OPTIONS", "/*"),
            ("CONNECT", "a:80"),
            ("CONNECT", "http://a/chat"),
        ] {
            assert!(fits(method, target), "{method} {target}");
        }
        for (method, target) in [
            ("GET", "a:80"),
            ("POST", "a"),
            ("OPTIONS", "a"),
            ("GET", "*"),
            ("CONNECT", "/"),
            ("CONNECT", "*"),
        ] {
            assert!(!fits(method, target), "{method} {target}");
        }
    }

    #[test]
    fn a_body_is_in_chunks_once_or_it_is_refused() {
        let coded = |values: &[&str]| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append(TRANSFER_ENCODING, value.parse().unwrap());
            }
            is_coded(&map, look(&map))
        };
        for plain in [&[][..], &["chunked"], &["Chunked"], &[", chunked ,"], &["", "chunked"]] {
            assert!(!coded(plain), "{plain:?}");
        }
        for more in [
            &["gzip, chunked"][..],
            &["chunked, chunked"],
            &["identity, chunked"],
            &["gzip", "chunked"],
            &["chunked", "chunked"],
            &["chunked", "identity"],
            &["\"a, chunked"],
        ] {
            assert!(coded(more), "{more:?}");
        }
    }

    #[test]
    fn trailers_say_nothing_of_framing_routing_or_who_asks() {
        let mut trailers = headers(&[
            ("x-sum", "1"),
            ("grpc-status", "0"),
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("host", "a"),
            ("connection", "close, x-named"),
            ("x-named", "1"),
            ("authorization", "x"),
            ("penstock-client-id", "spiffe://x"),
        ]);
        strip_trailers(&mut trailers);
        assert_eq!(trailers, headers(&[("x-sum", "1"), ("grpc-status", "0")]));
    }

    #[test]
    fn a_body_that_hyper_would_leave_out_is_announced() {
        use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
        let stream = || StreamBody::new(futures_util::stream::empty::<Result<_, std::convert::Infallible>>());
        let announced =
            |method: &str,
             length: bool,
             body: http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, _>| {
                let mut request = Request::builder().method(method).body(body).unwrap();
                if length {
                    request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("5"));
                }
                announce(&mut request);
                request.headers().contains_key(TRANSFER_ENCODING)
            };
        assert!(announced("GET", false, stream().boxed_unsync()));
        assert!(announced("HEAD", false, stream().boxed_unsync()));
        assert!(!announced("POST", false, stream().boxed_unsync()), "hyper says so itself");
        assert!(!announced("GET", true, stream().boxed_unsync()));
        assert!(!announced("GET", false, Full::from("x").boxed_unsync()));
        assert!(!announced("GET", false, Empty::new().boxed_unsync()));
    }

    #[test]
    fn cookies_are_whole_on_http1() {
        let mut map = HeaderMap::new();
        for piece in ["a=1", "b=2", "c=3"] {
            map.append(COOKIE, piece.parse().unwrap());
        }
        join_cookies(&mut map);
        assert_eq!(map, headers(&[("cookie", "a=1; b=2; c=3")]));
    }

    #[test]
    fn strangers_cannot_speak_as_sidecars() {
        assert!(
            stripped(&[
                ("penstock-client-id", "spiffe://x"),
                ("penstock-protocol", "1"),
                ("penstock-error", "x")
            ])
            .is_empty()
        );
    }

    #[test]
    fn a_request_takes_the_form_of_its_connection() {
        let authority: uri::Authority = "a.b:80".parse().unwrap();
        let mut request = Request::builder().uri("/x?y=1").header("host", "a.b:80").body(()).unwrap();
        shape(&mut request, &authority, Form::Absolute).unwrap();
        assert_eq!(request.uri(), "http://a.b:80/x?y=1");
        assert!(request.headers().is_empty());
        shape(&mut request, &authority, Form::Origin).unwrap();
        assert_eq!(
            (request.uri().to_string().as_str(), &request.headers()["host"]),
            ("/x?y=1", &"a.b:80".parse().unwrap())
        );
    }

    #[test]
    fn redirects_as_httproute_has_them() {
        let uri: uri::Uri = "/v2/models?x=1".parse().unwrap();
        let authority: uri::Authority = "a.b:8080".parse().unwrap();
        let nothing = Redirect {
            scheme: None,
            hostname: None,
            port: None,
            path: None,
            status: http::StatusCode::FOUND,
        };
        assert_eq!(location(&uri, &authority, &nothing, ""), "http://a.b:8080/v2/models?x=1");
        let https = Redirect { scheme: Some("https".into()), ..nothing };
        assert_eq!(location(&uri, &authority, &https, ""), "https://a.b/v2/models?x=1");
        let path = Redirect {
            path: Some(PathChange::Prefix("/v3".into())),
            hostname: Some("c".into()),
            port: Some(80),
            ..https
        };
        let path = Redirect { scheme: None, ..path };
        assert_eq!(location(&uri, &authority, &path, "/v2"), "http://c/v3/models?x=1");
    }

    #[test]
    fn prefix_rewrites() {
        let table = [
            ("/v2/x", "/v2", "/v3", "/v3/x"),
            ("/v2", "/v2", "", "/"),
            ("/v2/x?q", "/v2", "", "/x?q"),
            ("/x", "", "/new", "/new/x"),
        ];
        for (path, prefix, new, expected) in table {
            let uri: uri::Uri = path.parse().unwrap();
            assert_eq!(changed_path(&uri, &PathChange::Prefix(new.into()), prefix), expected, "{path}");
        }
    }

    #[test]
    fn http2_by_upgrade_is_not_offered_and_underscores_hide_nothing() {
        let of = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect()
        };
        for (protocol, expected) in [("websocket", true), ("h2c", false), ("websocket, H2C", false)] {
            let map = of(&[("connection", "upgrade"), ("upgrade", protocol)]);
            assert_eq!(asks_upgrade(&map, look(&map)), expected, "{protocol}");
        }
        let hidden: [&[u8]; 4] = [b"\xff, h2c", b"h2c/1", b"x,\th2c ;q", b"\xff"];
        for protocol in hidden {
            let mut map = of(&[("connection", "upgrade"), ("upgrade", "foo")]);
            map.append(UPGRADE, HeaderValue::from_bytes(protocol).unwrap());
            assert!(!asks_upgrade(&map, look(&map)), "{protocol:?}");
        }
        let mut map = of(&[
            ("penstock_client_id", "spiffe://x/ns/a/sa/b"),
            ("x_forwarded_client_cert", "By=x"),
            ("my_own", "1"),
        ]);
        let found = look(&map);
        strip_ours(&mut map, found);
        assert_eq!(map.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["my_own"]);
        let mut map = HeaderMap::new();
        map.insert(HeaderName::from_lowercase(b"x\"y").unwrap(), HeaderValue::from_static("1"));
        let found = look(&map);
        strip_ours(&mut map, found);
        assert!(map.is_empty(), "HTTP/1 cannot carry it");
    }
}
