//! The one place where the proxy answers by itself.
//!
//! In: a [`Failure`] or a redirect. Out: a response that says so: the header `penstock-error` with the reason, and
//! the story as the body. A gRPC client gets what its library understands: status 200 with `grpc-status`.

use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use penstock_api::names;
use penstock_api::reason::Blame;

use crate::body::ResponseBody;
use crate::exchange::Exchange;
use crate::failure::Failure;

/// Whether the request is gRPC, by its content type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// The response of an exchange: the server's, or our own answer to what went wrong.
pub fn settle(
    exchange: &Exchange,
    result: Result<Response<ResponseBody>, Failure>,
    grpc: bool,
) -> Response<ResponseBody> {
    result.unwrap_or_else(|error| {
        exchange.failed(&error);
        exchange.complete();
        failure(&error, grpc)
    })
}

/// Answers with a failure.
pub fn failure(failure: &Failure, grpc: bool) -> Response<ResponseBody> {
    let mut response;
    if grpc {
        response = Response::new(ResponseBody::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        grpc_status(headers, failure.reason.grpc_status(), &failure.to_string());
    } else {
        let text = format!("{failure}\n");
        let length = text.len();
        response = Response::new(ResponseBody::whole(text));
        *response.status_mut() =
            StatusCode::from_u16(failure.reason.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    let headers = response.headers_mut();
    // What is wrong with the request is wrong everywhere else too.
    if failure.unprocessed && failure.reason.blame() != Blame::Client {
        headers.insert(names::header::UNTOUCHED, HeaderValue::from_static("1"));
    }
    if failure.retry_after > 0 {
        headers.insert(RETRY_AFTER, HeaderValue::from(failure.retry_after));
    }
    headers.insert(names::header::ERROR, HeaderValue::from_static(failure.reason.as_str()));
    response
}

/// Answers with a redirect that a route asked for.
pub fn redirect(status: StatusCode, location: HeaderValue) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    *response.status_mut() = status;
    response.headers_mut().insert(LOCATION, location);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(0));
    response
}

/// Says, in headers or trailers, how a gRPC call ended.
pub fn grpc_status(headers: &mut HeaderMap, status: u8, message: &str) {
    headers.insert("grpc-status", HeaderValue::from(u16::from(status)));
    if let Ok(message) = HeaderValue::try_from(grpc_message(message)) {
        headers.insert("grpc-message", message);
    }
}

/// Percent-encodes a gRPC message: printable ASCII but `%` stays (gRPC over HTTP/2, "Responses").
fn grpc_message(text: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'$' | b'&'..=b'~' => out.push(char::from(byte)),
            _ => {
                // Writing to a String cannot fail.
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::Reason;

    #[test]
    fn every_reason_names_itself_in_both_protocols() {
        for reason in Reason::ALL {
            let story = Failure::new(*reason, "to a/b: 50% of\nnothing");
            let http = failure(&story, false);
            assert_eq!(http.status().as_u16(), reason.status());
            assert_eq!(http.headers()["penstock-error"], reason.as_str());
            let grpc = failure(&story, true);
            assert_eq!(grpc.status(), 200);
            assert_eq!(grpc.headers()["grpc-status"], reason.grpc_status().to_string().as_str());
            assert!(grpc.headers()["grpc-message"].to_str().unwrap().ends_with("50%25 of%0Anothing"));
        }
    }
}
