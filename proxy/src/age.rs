//! How old connections and streams may become.
//!
//! A client that keeps one connection, or one stream on it, is pinned to whom it found first: pods that come later
//! stay idle. An age makes it choose again, and is drawn for each, so that a thousand streams that began together do
//! not end together. A gRPC stream ends in the words of its protocol, UNAVAILABLE, which its library takes as a reason to
//! open another; HTTP has no such words for a response that has begun, so others are left alone.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use penstock_api::{Reason, names};
use rand::Rng;

use crate::answer;
use crate::exchange::Exchange;

/// The age at which one of many is over: a tenth less or more. `None`: never.
pub fn drawn(age: Duration, random: &mut impl Rng) -> Option<Duration> {
    (!age.is_zero()).then(|| age.mul_f64(random.random_range(0.9..=1.1)))
}

/// The age of a response.
pub enum Age {
    /// It may go on for ever.
    Unlimited,
    /// Nobody had to wait for it yet. Most end like that, and cost nothing.
    Young,
    /// It is being waited for, and so is this.
    Until(Pin<Box<dyn Future<Output = ()>>>),
    /// It has been ended.
    Over,
}

impl std::fmt::Debug for Age {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unlimited => "Unlimited",
            Self::Young => "Young",
            Self::Until(_) => "Until",
            Self::Over => "Over",
        })
    }
}

impl Age {
    /// Ready when the response has to end.
    pub fn poll_over(&mut self, cx: &mut Context<'_>, exchange: &Rc<Exchange>) -> Poll<()> {
        loop {
            match self {
                Self::Unlimited => return Poll::Pending,
                Self::Young => *self = Self::Until(Box::pin(until(exchange))),
                Self::Until(over) => {
                    std::task::ready!(over.as_mut().poll(cx));
                    *self = Self::Over;
                }
                Self::Over => return Poll::Ready(()),
            }
        }
    }
}

fn until(exchange: &Rc<Exchange>) -> impl Future<Output = ()> + use<> {
    let worker = &exchange.worker;
    let age = worker.with_random(|random| drawn(worker.shared.limits.stream_age, random));
    let end = age.map(|age| exchange.started() + age);
    let mut last_call = worker.shared.drain.last_call();
    async move {
        let old = async {
            match end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = old => {}
            // An error means that the worker is gone, and the stream with it.
            _ = last_call.wait_for(|called| *called) => {}
        }
    }
}

/// The trailers of a stream that is over.
pub fn farewell() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    let reason = Reason::StreamOver;
    answer::grpc_status(&mut trailers, reason.grpc_status(), reason.meaning());
    trailers.insert(names::header::ERROR, HeaderValue::from_static(reason.as_str()));
    trailers
}

/// Whether these are such trailers: the server has not failed.
pub fn is_farewell(trailers: &HeaderMap) -> bool {
    trailers.get(names::header::ERROR).is_some_and(|word| word == Reason::StreamOver.as_str())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn ages_differ_by_a_tenth_and_none_is_for_ever() {
        let mut random = SmallRng::seed_from_u64(1);
        let ages: Vec<_> = (0..100).filter_map(|_| drawn(Duration::from_secs(100), &mut random)).collect();
        assert!(ages.iter().all(|age| (90.0..=110.0).contains(&age.as_secs_f64())));
        assert!(ages.iter().max().unwrap().as_secs() - ages.iter().min().unwrap().as_secs() > 10);
        assert_eq!(drawn(Duration::ZERO, &mut random), None);
    }

    #[test]
    fn a_farewell_is_known_as_one() {
        assert!(is_farewell(&farewell()));
        assert_eq!(farewell()["grpc-status"], "14");
        assert!(!is_farewell(&HeaderMap::new()));
    }
}
