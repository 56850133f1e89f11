//! The annotations of Services; an `InferencePolicy` says the same in the same words. Those of pods are read by
//! [`penstock_api::annotation::pod`].
//!
//! In: the value of an annotation. Out: the message it stands for. Can go wrong: the text doesn't parse; the error
//! says which word is wrong and what would be right.

use penstock_api::annotation::grammar::{Parsed, bytes, number, settings, words};
use penstock_api::annotation::pod as of_pod;
use penstock_api::names::annotation;
use penstock_api::service::is_label;
use penstock_api::v1::{self, Balance, Sticky, sticky};

/// The largest weight that the Gateway API allows; the annotation follows it.
pub const MAX_WEIGHT: u32 = 1_000_000;

/// An annotation of a Service: its name, and how it fills the policy.
type Setting = (&'static str, fn(&str, &mut v1::Policy) -> Parsed<()>);

/// The annotations that make up a Service's policy.
pub const OF_POLICY: [Setting; 9] = [
    (annotation::BALANCE, |text, policy| {
        balance(text).map(|(balance, tuning)| {
            policy.set_balance(balance);
            policy.tuning = tuning;
        })
    }),
    (annotation::STICKY, |text, policy| sticky(text).map(|sticky| policy.sticky = Some(sticky))),
    (annotation::TIMEOUT, |text, policy| timeouts(text).map(|timeouts| policy.timeouts = Some(timeouts))),
    (annotation::RETRY, |text, policy| retry(text).map(|retry| policy.retry = Some(retry))),
    (annotation::OUTLIER, |text, policy| outlier(text).map(|outlier| policy.outlier = Some(outlier))),
    (annotation::LIMITS, |text, policy| limits(text).map(|limits| policy.limits = Some(limits))),
    (annotation::BATCH, |text, policy| batch(text).map(|batch| policy.batch = Some(batch))),
    (annotation::COALESCE, |text, policy| coalesce(text).map(|coalesce| policy.coalesce = Some(coalesce))),
    (annotation::ADMISSION, |text, policy| {
        let read = of_pod::ADMISSION.read(text).map_err(|error| error.why);
        read.map(|admission| policy.admission = Some(admission))
    }),
];

/// `gpu`, `prefix`, `least-request`, `round-robin`, `ring-hash` or `orca-wrr`; and how it is tuned, as
/// `gpu,choices=4,explore=2%,hot=90%`, `prefix,choices=4,explore=0` or `ring-hash,bound=1.5`.
pub fn balance(text: &str) -> Parsed<(Balance, Option<v1::Tuning>)> {
    let (name, rest) = text.split_once(',').map_or((text, None), |(name, rest)| (name, Some(rest)));
    let (balance, known): (_, &[&str]) = match name.trim() {
        "gpu" => (Balance::Gpu, &["choices", "explore", "hot"]),
        "prefix" => (Balance::Prefix, &["choices", "explore"]),
        "ring-hash" => (Balance::RingHash, &["bound"]),
        "least-request" => (Balance::LeastRequest, &[]),
        "round-robin" => (Balance::RoundRobin, &[]),
        "orca-wrr" => (Balance::OrcaWrr, &[]),
        other => {
            return Err(format!(
                "{other:?} is not a way to balance; write gpu, prefix, least-request, round-robin, ring-hash or orca-wrr"
            ));
        }
    };
    let Some(rest) = rest else { return Ok((balance, None)) };
    if known.is_empty() {
        return Err(format!("{} has no settings; write it alone", name.trim()));
    }
    let mut tuning = v1::Tuning::default();
    settings(rest, known, |key, value| {
        match key {
            "choices" => tuning.choices = Some(number(value, 2, 8)?),
            "explore" => tuning.explore_permille = Some(permille(value)?),
            "hot" => tuning.hot_permille = Some(permille(value)?),
            _ => match thousandths(value) {
                Some(bound @ 1_000..=100_000) => tuning.bound_permille = Some(bound),
                _ => return Err(format!("{value:?} is not from 1 to 100; write for example 1.25")),
            },
        }
        Ok(())
    })?;
    Ok((balance, Some(tuning)))
}

/// `header:<name>` or `cookie:<name>`.
pub fn sticky(text: &str) -> Parsed<Sticky> {
    let key = match text.trim().split_once(':') {
        Some(("header", name)) => sticky::Key::Header(header_name(name)?),
        // RFC 6265: a cookie's name is a token, as a header's is, but its case counts.
        Some(("cookie", name)) if is_token(name) => sticky::Key::Cookie(name.to_owned()),
        _ => return Err(format!("{text:?} names no key; write header:<name> or cookie:<name>")),
    };
    Ok(Sticky { key: Some(key) })
}

/// `connect=1s,request=30s,per-try=10s,idle=5m`.
pub fn timeouts(text: &str) -> Parsed<v1::Timeouts> {
    let mut timeouts = v1::Timeouts::default();
    settings(text, &["connect", "request", "per-try", "idle"], |key, value| {
        let ms = Some(milliseconds(value)?);
        match key {
            "connect" => timeouts.connect_ms = ms,
            "request" => timeouts.request_ms = ms,
            "per-try" => timeouts.per_try_ms = ms,
            _ => timeouts.idle_ms = ms,
        }
        Ok(())
    })?;
    check_tries(timeouts.request_ms, timeouts.per_try_ms)?;
    Ok(timeouts)
}

/// One try may not be given more time than all of them together.
pub fn check_tries(request_ms: Option<u64>, per_try_ms: Option<u64>) -> Parsed<()> {
    match (request_ms, per_try_ms) {
        (Some(request), Some(per_try)) if request > 0 && per_try > request => Err(format!(
            "one try may take {per_try} ms but the whole request only {request} ms; \
             shorten the try or lengthen the request"
        )),
        _ => Ok(()),
    }
}

/// `attempts=2,on=503+429,budget=20%,buffer=64Ki`.
pub fn retry(text: &str) -> Parsed<v1::Retry> {
    let mut retry = v1::Retry::default();
    settings(text, &["attempts", "on", "budget", "buffer"], |key, value| {
        match key {
            "attempts" => retry.attempts = Some(number(value, 0, 10)?),
            "on" => {
                retry.codes = value.split('+').map(|code| number(code, 400, 599)).collect::<Parsed<_>>()?
            }
            "budget" => retry.budget_percent = Some(percent(value)?),
            _ => retry.buffer_bytes = Some(bytes(value)?),
        }
        Ok(())
    })?;
    Ok(retry)
}

/// `failures=5,base=1s,max=60s,ejected=50%`.
pub fn outlier(text: &str) -> Parsed<v1::Outlier> {
    let mut outlier = v1::Outlier::default();
    settings(text, &["failures", "base", "max", "ejected"], |key, value| {
        match key {
            "failures" => outlier.consecutive_failures = Some(number(value, 0, u32::MAX)?),
            "base" => outlier.base_ejection_ms = Some(milliseconds(value)?),
            "max" => outlier.max_ejection_ms = Some(milliseconds(value)?),
            _ => outlier.max_ejected_percent = Some(percent(value)?),
        }
        Ok(())
    })?;
    match (outlier.base_ejection_ms, outlier.max_ejection_ms) {
        (Some(base), Some(max)) if base > max => {
            Err(format!("the first ejection of {base} ms is longer than the longest of {max} ms; swap them"))
        }
        _ => Ok(outlier),
    }
}

/// `connections=1024,pending=1024,requests=4096`.
pub fn limits(text: &str) -> Parsed<v1::Limits> {
    let mut limits = v1::Limits::default();
    settings(text, &["connections", "pending", "requests"], |key, value| {
        let limit = Some(number(value, 1, u32::MAX)?);
        match key {
            "connections" => limits.max_connections = limit,
            "pending" => limits.max_pending = limit,
            _ => limits.max_requests = limit,
        }
        Ok(())
    })?;
    Ok(limits)
}

/// `max=32,delay=2ms`; further `bytes=64Mi,elements=65536,concurrent=2,target=50ms`.
pub fn batch(text: &str) -> Parsed<v1::Batch> {
    let mut batch = v1::Batch::default();
    let known = ["max", "delay", "bytes", "elements", "concurrent", "target"];
    settings(text, &known, |key, value| {
        match (key, value) {
            ("max", "server") => batch.rows = 0,
            ("max", value) => batch.rows = number(value, 1, 65_536)?,
            ("delay", value) => batch.delay_ms = Some(milliseconds(value)?),
            ("bytes", value) => batch.bytes = bytes(value)?,
            ("elements", value) => batch.elements = number(value, 1, u32::MAX)?.into(),
            ("concurrent", value) => batch.concurrent = number(value, 1, 256)?,
            (_, value) => match milliseconds(value)? {
                0 => return Err("no latency at all cannot be kept; write for example 50ms".to_owned()),
                target => batch.target_ms = Some(target),
            },
        }
        Ok(())
    })?;
    Ok(batch)
}

/// `single-flight,cache=256Mi/30s`; further `outbound`, `shared`, `deterministic`, `headers=accept-language+x-tone`.
pub fn coalesce(text: &str) -> Parsed<v1::Coalesce> {
    let mut coalesce = v1::Coalesce::default();
    for word in words(text)? {
        match word.split_once('=') {
            None if word == "single-flight" => coalesce.single_flight = true,
            None if word == "outbound" => coalesce.outbound = true,
            None if word == "shared" => coalesce.shared = true,
            None if word == "deterministic" => coalesce.deterministic = true,
            Some(("cache", cache)) => {
                let (size, age) = cache.split_once('/').ok_or_else(|| {
                    format!("cache={cache} has no age; write cache=<size>/<age>, for example cache=256Mi/30s")
                })?;
                coalesce.cache_bytes = bytes(size)?;
                coalesce.cache_ms = milliseconds(age)?;
            }
            Some(("headers", names)) => {
                coalesce.headers = names.split('+').map(header_name).collect::<Parsed<_>>()?;
            }
            _ => {
                return Err(format!(
                    "{word:?} is not known; write single-flight, outbound, cache=<size>/<age>, shared, \
                     deterministic, \
                     headers=<name>+<name>"
                ));
            }
        }
    }
    if !coalesce.single_flight && coalesce.cache_bytes == 0 {
        return Err("it shares nothing; write single-flight, cache=<size>/<age> or both".to_owned());
    }
    if coalesce.outbound && !coalesce.single_flight {
        return Err("outbound says where single-flight holds too; write single-flight,outbound".to_owned());
    }
    Ok(coalesce)
}

/// `resnet-v1=90,resnet-v2=10`, in the order of the text.
pub fn traffic_split(text: &str) -> Parsed<Vec<(String, u32)>> {
    let mut split: Vec<(String, u32)> = Vec::new();
    for word in words(text)? {
        let (name, weight) = word.split_once('=').ok_or_else(|| {
            format!("{word:?} has no weight; write <service>=<weight>, for example {word}=10")
        })?;
        let name = name.trim();
        if !is_label(name) {
            return Err(format!("{name:?} is not the name of a Service of this namespace"));
        }
        if split.iter().any(|(known, _)| known == name) {
            return Err(format!("{name} is named twice; give it one weight"));
        }
        split.push((name.to_owned(), number(weight, 0, MAX_WEIGHT)?));
    }
    if split.iter().all(|(_, weight)| *weight == 0) {
        return Err("the weights sum to 0, so no request could go anywhere; give one of them more".to_owned());
    }
    Ok(split)
}

/// A header's name, in lower case.
pub fn header_name(text: &str) -> Parsed<String> {
    http::HeaderName::try_from(text)
        .map(|name| name.as_str().to_owned())
        .map_err(|_| format!("{text:?} is not a header name"))
}

/// A duration in the form of the Gateway API (GEP-2257), in milliseconds.
pub fn milliseconds(text: &str) -> Parsed<u64> {
    let duration: gateway_api::Duration = text.trim().parse().map_err(|_| {
        format!("{text:?} is not a duration; write whole numbers with h, m, s or ms, as 1m30s")
    })?;
    u64::try_from(duration.as_millis()).map_err(|_| format!("{text:?} is too long"))
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn percent(text: &str) -> Parsed<u32> {
    match text.strip_suffix('%') {
        Some(text) => number(text, 0, 100),
        None => Err(format!("{text:?} is not a percentage; write for example 20%")),
    }
}

/// A share of all, `2%` or `0.02`, in thousandths.
fn permille(text: &str) -> Parsed<u32> {
    let share = match text.strip_suffix('%') {
        Some(percent) => thousandths(percent).filter(|share| share % 100 == 0).map(|share| share / 100),
        None => thousandths(text),
    };
    share
        .filter(|share| *share <= 1_000)
        .ok_or_else(|| format!("{text:?} is not a share in whole thousandths; write for example 2% or 0.02"))
}

/// A decimal number of at most three places, in thousandths.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, places) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(places) || places.len() > 3 {
        return None;
    }
    let places: u32 = format!("{places:0<3}").parse().ok()?;
    whole.parse::<u32>().ok()?.checked_mul(1_000)?.checked_add(places)
}

#[cfg(test)]
mod tests {
    use penstock_api::annotation::{ALL, On};

    use super::*;

    #[test]
    fn a_policy_is_read_whole() {
        let table = [
            (annotation::BALANCE, "gpu, choices=4,explore=2.5%,hot=0.9"),
            (annotation::STICKY, "header:X-User"),
            (annotation::TIMEOUT, "connect=1s, request=30s,per-try=10s,idle=1m30s"),
            (annotation::RETRY, "attempts=2,on=503+429,budget=20%,buffer=64Ki"),
            (annotation::OUTLIER, "failures=5,base=1s,max=60s,ejected=50%"),
            (annotation::LIMITS, "connections=1,pending=2,requests=3"),
            (annotation::BATCH, "max=32,delay=2ms,bytes=64Mi,elements=9,concurrent=2,target=50ms"),
            (
                annotation::COALESCE,
                "single-flight,outbound,cache=256Mi/30s,shared,deterministic,headers=Accept-Language+x-tone",
            ),
            (annotation::ADMISSION, "limit=8,queue=2"),
        ];
        let mut policy = v1::Policy::default();
        for (name, text) in table {
            let (_, read) = OF_POLICY.iter().find(|(known, _)| *known == name).unwrap();
            read(text, &mut policy).unwrap();
        }
        let expected = v1::Policy {
            balance: Balance::Gpu as i32,
            tuning: Some(v1::Tuning {
                choices: Some(4),
                explore_permille: Some(25),
                hot_permille: Some(900),
                bound_permille: None,
            }),
            sticky: Some(Sticky { key: Some(sticky::Key::Header("x-user".into())) }),
            timeouts: Some(v1::Timeouts {
                connect_ms: Some(1_000),
                request_ms: Some(30_000),
                per_try_ms: Some(10_000),
                idle_ms: Some(90_000),
            }),
            retry: Some(v1::Retry {
                attempts: Some(2),
                codes: vec![503, 429],
                budget_percent: Some(20),
                buffer_bytes: Some(65_536),
            }),
            outlier: Some(v1::Outlier {
                consecutive_failures: Some(5),
                base_ejection_ms: Some(1_000),
                max_ejection_ms: Some(60_000),
                max_ejected_percent: Some(50),
            }),
            limits: Some(v1::Limits {
                max_connections: Some(1),
                max_pending: Some(2),
                max_requests: Some(3),
            }),
            batch: Some(v1::Batch {
                rows: 32,
                bytes: 64 << 20,
                elements: 9,
                delay_ms: Some(2),
                concurrent: 2,
                target_ms: Some(50),
            }),
            pipelines: Vec::new(),
            admission: Some(v1::Admission { limit: 8, queue: 2 }),
            coalesce: Some(v1::Coalesce {
                single_flight: true,
                cache_bytes: 256 << 20,
                cache_ms: 30_000,
                shared: true,
                deterministic: true,
                outbound: true,
                headers: vec!["accept-language".into(), "x-tone".into()],
            }),
        };
        assert_eq!(policy, expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let table: [(&str, &str, &str); 39] = [
            (annotation::BALANCE, "random", "write gpu, prefix"),
            (annotation::BALANCE, "gpu,", "empty part"),
            (annotation::BALANCE, "gpu,choices=1", "choices: \"1\" is not a whole number from 2 to 8"),
            (annotation::BALANCE, "gpu,choices=9", "from 2 to 8"),
            (annotation::BALANCE, "gpu,explore=1.5", "not a share"),
            (annotation::BALANCE, "gpu,explore=0.01%", "whole thousandths"),
            (annotation::BALANCE, "gpu,hot=-1", "not a share"),
            (annotation::BALANCE, "gpu,hot=110%", "not a share"),
            (annotation::BALANCE, "gpu,bound=2", "the settings are choices, explore, hot"),
            (annotation::BALANCE, "prefix,hot=90%", "the settings are choices, explore"),
            (annotation::BALANCE, "ring-hash,bound=0.9", "not from 1 to 100"),
            (annotation::BALANCE, "round-robin,choices=2", "round-robin has no settings"),
            (annotation::BALANCE, "gpu,choices", "choices has no value"),
            (annotation::STICKY, "user", "header:<name> or cookie:<name>"),
            (annotation::STICKY, "header:a b", "not a header name"),
            (annotation::STICKY, "cookie:", "names no key"),
            (
                annotation::TIMEOUT,
                "reqest=1s",
                "\"reqest\" is not a setting; the settings are connect, request",
            ),
            (annotation::TIMEOUT, "request=1s,request=2s", "set twice"),
            (annotation::TIMEOUT, "request=1.5s", "not a duration"),
            (annotation::TIMEOUT, "request=-1s", "not a duration"),
            (annotation::TIMEOUT, "request", "request has no value"),
            (annotation::TIMEOUT, "request=1s,,idle=1s", "empty part"),
            (annotation::TIMEOUT, "request=1s,per-try=2s", "one try may take 2000 ms"),
            (annotation::TIMEOUT, "", "empty part"),
            (annotation::RETRY, "attempts=11", "from 0 to 10"),
            (annotation::RETRY, "on=200", "from 400 to 599"),
            (annotation::RETRY, "budget=20", "write for example 20%"),
            (annotation::RETRY, "budget=120%", "from 0 to 100"),
            (annotation::RETRY, "buffer=64KB", "not a size"),
            (annotation::RETRY, "buffer=99999999999999999999Gi", "not a size"),
            (annotation::OUTLIER, "base=2m,max=1m", "longer than the longest"),
            (annotation::LIMITS, "connections=0", "at least 1"),
            (annotation::BATCH, "max=0", "from 1 to 65536"),
            (annotation::BATCH, "delay=2", "not a duration"),
            (annotation::COALESCE, "cache=256Mi", "has no age"),
            (annotation::BATCH, "target=0s", "no latency at all"),
            (annotation::COALESCE, "double-flight", "is not known"),
            (annotation::COALESCE, "shared", "shares nothing"),
            (annotation::COALESCE, "outbound,cache=1Mi/1s", "write single-flight,outbound"),
        ];
        for (name, text, words) in table {
            let (_, read) = OF_POLICY.iter().find(|(known, _)| *known == name).unwrap();
            let error = read(text, &mut v1::Policy::default()).expect_err(text);
            assert!(error.contains(words), "{name} {text:?}: {error}");
        }
    }

    #[test]
    fn a_policy_alone_leaves_its_settings_to_the_proxy() {
        assert_eq!(balance(" round-robin "), Ok((Balance::RoundRobin, None)));
        let bound = v1::Tuning { bound_permille: Some(1_500), ..v1::Tuning::default() };
        assert_eq!(balance("ring-hash,bound=1.5"), Ok((Balance::RingHash, Some(bound))));
    }

    #[test]
    fn shares_are_percent_or_parts_of_one() {
        let table =
            [("2%", 20), ("0.02", 20), ("0.5%", 5), ("100%", 1_000), ("1", 1_000), ("0", 0), ("0.125", 125)];
        for (text, share) in table {
            assert_eq!(permille(text), Ok(share), "{text}");
        }
        for bad in ["", "%", ".5", "1.", "0.0001", "1e-2", "+1", "4294968"] {
            assert!(permille(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_traffic_split_is_read_in_its_order() {
        assert_eq!(traffic_split("b=90, a=10"), Ok(vec![("b".into(), 90), ("a".into(), 10)]));
        assert_eq!(traffic_split("a=0,b=1"), Ok(vec![("a".into(), 0), ("b".into(), 1)]));
        let table = [
            ("a=0,b=0", "sum to 0"),
            ("a", "has no weight"),
            ("a=1,a=2", "named twice"),
            ("a=-1", "from 0 to 1000000"),
            ("a=1000001", "from 0 to 1000000"),
            ("A=1", "not the name of a Service"),
            ("other/a=1", "not the name of a Service"),
            ("a=1,", "empty part"),
        ];
        for (text, words) in table {
            let error = traffic_split(text).unwrap_err();
            assert!(error.contains(words), "{text:?}: {error}");
        }
    }

    #[test]
    fn examples_in_the_table_of_annotations_are_read() {
        for one in ALL.iter().filter(|one| matches!(one.on, On::Service | On::ServiceAndPod)) {
            assert!(!one.examples.is_empty(), "{}", one.name);
            for example in one.examples {
                let of_policy = OF_POLICY.iter().find(|(name, _)| *name == one.name);
                let read = match of_policy {
                    Some((_, read)) => read(example, &mut v1::Policy::default()),
                    None if one.name == annotation::TRAFFIC_SPLIT => traffic_split(example).map(drop),
                    None => panic!("nobody reads {}", one.name),
                };
                assert_eq!(read, Ok(()), "{} {example}", one.name);
            }
        }
        let split = ALL.iter().find(|one| one.name == annotation::TRAFFIC_SPLIT).unwrap();
        assert!(split.form.contains(&format!("0 to {MAX_WEIGHT}")));
    }
}
