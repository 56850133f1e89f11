//! A request that can be sent again: its head is copied, and its body kept as it passes.

use std::rc::Rc;

use http::Request;
use http_body::Body;

use super::Outgoing;
use crate::body::RequestBody;
use crate::config::RetryPolicy;
use crate::exchange::Exchange;
use crate::kept::{self, Kept};

/// What a further try starts from.
pub struct Replay {
    parts: http::request::Parts,
    body: Option<Rc<Kept>>,
    authority: http::uri::Authority,
    spoken: http::Version,
}

impl Replay {
    /// Has the request kept, as far as `retry` allows. A body that says that it is too large is not kept at all.
    pub fn keep(outgoing: &mut Outgoing, exchange: &Rc<Exchange>, retry: &RetryPolicy) -> Option<Box<Self>> {
        let request = &mut outgoing.request;
        if outgoing.upgrade || request.body().size_hint().lower() > retry.buffer as u64 {
            return None;
        }
        let body = kept::keep(request.body_mut(), exchange);
        if let Some(kept) = &body {
            kept.set_room(retry.buffer);
        }
        let mut copy = Request::new(());
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.version_mut() = request.version();
        *copy.headers_mut() = request.headers().clone();
        let parts = copy.into_parts().0;
        Some(Box::new(Self { parts, body, authority: outgoing.authority.clone(), spoken: outgoing.spoken }))
    }

    /// The request for another try, if its body is still known from the beginning.
    pub fn again(&self) -> Option<Box<Outgoing>> {
        let body = match &self.body {
            Some(kept) if kept.is_lost() => return None,
            Some(kept) => RequestBody::Kept(kept.again()),
            None => RequestBody::Empty,
        };
        Some(Box::new(Outgoing {
            request: Request::from_parts(self.parts.clone(), body),
            authority: self.authority.clone(),
            spoken: self.spoken,
            upgrade: false,
        }))
    }
}
