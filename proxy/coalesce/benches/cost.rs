//! What it costs to find out whether two requests are the same, and to form batches.

#![allow(missing_docs, reason = "the macros of criterion make functions without")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http::HeaderMap;
use penstock_coalesce::batch::{Ask, Formed, Former, Limits};
use penstock_coalesce::key::{self, Scope};
use penstock_inference::oip::{InferRequest, Tensor};

fn costs(criterion: &mut Criterion) {
    let scope = Scope { client: "", model: "m", version: "", load: 0, headers: &[] };
    let mut group = criterion.benchmark_group("hash");
    for kib in [1_u64, 600, 6 << 10] {
        let elements = kib * 256;
        let input = Tensor::fp32("x", vec![1, elements], (0..elements).map(|at| at as f32));
        let request = InferRequest { inputs: vec![input], ..InferRequest::default() };
        group.throughput(Throughput::Bytes(kib << 10));
        group.bench_function(format!("{kib} KiB"), |bench| {
            bench.iter(|| key::of_tensors(black_box(&request), &scope, &HeaderMap::new()));
        });
    }
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
    group.finish();
}

criterion_group!(benches, costs);
criterion_main!(benches);
