//! What it costs to find out whether two requests are the same, and to form batches.

#![allow(missing_docs, reason = "the macros of criterion make functions without")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http::HeaderMap;
use penstock_coalesce::batch::{Ask, Formed, Former, Limits};
use penstock_coalesce::json::Document;
use penstock_coalesce::key::{self, Scope};
use penstock_inference::oip::{InferRequest, Tensor};

fn costs(criterion: &mut Criterion) {
    let scope = Scope { client: "", model: "m", version: "", load: 0, headers: &[] };
    let mut group = criterion.benchmark_group("hash");
    for kib in [1_u64, 600, 6 << 10, 64 << 10] {
        let elements = kib * 256;
        let input = Tensor::fp32("x", vec![1, elements], (0..elements).map(|at| at as f32));
        let request = InferRequest { inputs: vec![input], ..InferRequest::default() };
        group.throughput(Throughput::Bytes(kib << 10));
        group.bench_function(format!("{kib} KiB"), |bench| {
            bench.iter(|| key::of_tensors(black_box(&request), &scope, &HeaderMap::new()));
        });
    }
    group.finish();
    let text = serde_json::json!({"temperature": 0, "model": "m", "messages": [
        {"role": "system", "content": "You are brief. ".repeat(100)},
        {"role": "user", "content": "why?\n".repeat(10_000)},
    ]});
    let text = text.to_string();
    let mut group = criterion.benchmark_group("json");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("60 kB of chat", |bench| {
        bench.iter(|| {
            let document = Document::read(black_box(text.as_bytes()));
            document.map(|document| key::of_document("/", &document, &scope, &HeaderMap::new()))
        });
    });
    group.finish();
    let mut group = criterion.benchmark_group("batch");
    group.throughput(Throughput::Elements(32));
    group.bench_function("32 members join and are sent", |bench| {
        let limits = Limits { rows: 32, concurrent: 1, ..Limits::default() };
        let mut former = Former::new(limits);
        let ask =
            |tenant| Ask { key: 1, rows: 1, bytes: 600, elements: 150, deadline: None, tenant, priority: 1 };
        // One is in flight all the time, so that the others wait.
        let _ = former.join(ask(0), 0, Duration::ZERO);
        let Some(Formed::Batch(mut flying)) = former.next(Duration::ZERO) else { return };
        bench.iter_batched(
            || (),
            |()| {
                for member in 0..32 {
                    let _ = former.join(ask(member % 4), member, Duration::ZERO);
                }
                former.done(flying.id, Duration::ZERO, false);
                if let Some(Formed::Batch(batch)) = former.next(Duration::ZERO) {
                    flying = batch;
                }
            },
            BatchSize::SmallInput,
        );
    });
    // Where a queue has built up, and everybody has a deadline.
    group.throughput(Throughput::Elements(1));
    for waiting in [0_u32, 10_000] {
        let limits =
            Limits { rows: 32, concurrent: 1, delay: Some(Duration::from_secs(9)), ..Limits::default() };
        let mut former = Former::new(limits);
        let ask = |at: u32| Ask {
            key: u128::from(at % 100),
            rows: 1,
            bytes: 600,
            elements: 150,
            deadline: Some(Duration::from_secs(u64::from(at) + 100)),
            tenant: u64::from(at % 10),
            priority: 1,
        };
        let _ = former.join(ask(0), 0, Duration::ZERO);
        let _ = former.next(Duration::ZERO);
        for at in 0..waiting {
            let _ = former.join(ask(at), at, Duration::ZERO);
        }
        let mut at = 0;
        group.bench_function(format!("one of {waiting} joins, nothing is due, it leaves"), |bench| {
            bench.iter(|| {
                at = (at + 1) % 10_000;
                let joined = former.join(ask(at), at, Duration::ZERO);
                let due = former.next(Duration::ZERO).is_some();
                (joined.map(|ticket| former.leave(ticket)), due)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, costs);
criterion_main!(benches);
