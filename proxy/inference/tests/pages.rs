//! A page of each kind of server, with the names that it documents, and what is read from it. The pages are written by
//! hand (see pages/README.md).

use penstock_inference::page::{Kind, Lora, Rates, Reading, dcgm};
use std::time::Duration;

const PAGES: [(Kind, &[u8]); 9] = [
    (Kind::Triton, include_bytes!("pages/triton.txt")),
    (Kind::TritonTrtLlm, include_bytes!("pages/triton-trtllm.txt")),
    (Kind::TrtLlmServe, include_bytes!("pages/trtllm-serve.txt")),
    (Kind::Vllm, include_bytes!("pages/vllm.txt")),
    (Kind::Vllm, include_bytes!("pages/vllm-old.txt")),
    (Kind::Sglang, include_bytes!("pages/sglang.txt")),
    (Kind::Tgi, include_bytes!("pages/tgi.txt")),
    (Kind::TorchServe, include_bytes!("pages/torchserve.txt")),
    (Kind::MlServer, include_bytes!("pages/mlserver.txt")),
];

fn read(page: &[u8]) -> Reading {
    // A page that is not recognised reads as nothing, which no test expects.
    Reading::read(page, None).unwrap_or_default()
}

#[test]
fn the_kind_of_server_shows_on_its_page() {
    for (kind, page) in PAGES {
        assert_eq!(Kind::detect(page), Some(kind));
        assert_eq!(read(page).kind, Some(kind));
    }
    assert_eq!(Kind::detect(include_bytes!("pages/dcgm.txt")), None);
}

#[test]
fn triton() {
    let expected = Reading {
        kind: Some(Kind::Triton),
        waiting: Some(9.0),
        requests: Some(120.0),
        failures: Some(6.0),
        rows: Some(880.0),
        executions: Some(110.0),
        queue_seconds: Some(2.0),
        compute_seconds: Some(3.0),
        gpu_utilization: Some(0.9),
        gpu_memory_used: Some(40e9),
        gpu_memory_total: Some(160e9),
        pinned_used: Some(67_108_864.0),
        pinned_total: Some(268_435_456.0),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[0].1), expected);
    let nothing = Reading {
        requests: Some(0.0),
        rows: Some(0.0),
        executions: Some(0.0),
        queue_seconds: Some(0.0),
        compute_seconds: Some(0.0),
        failures: Some(0.0),
        ..expected
    };
    let rates = Rates::between(&nothing, &expected, Duration::from_secs(10));
    assert_eq!((rates.requests, rates.batch_rows, rates.compute_ms), (Some(12.0), Some(8.0), Some(25.0)));
}

#[test]
fn tensorrt_llm_in_triton() {
    let expected = Reading {
        kind: Some(Kind::TritonTrtLlm),
        waiting: Some(5.0),
        running: Some(8.0),
        kv_usage: Some(0.25),
        kv_blocks: Some(6240.0),
        block_tokens: Some(64.0),
        requests: Some(50.0),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[1].1), expected);
}

#[test]
fn trtllm_serve() {
    let expected = Reading {
        kind: Some(Kind::TrtLlmServe),
        waiting: Some(3.0),
        running: Some(12.0),
        kv_usage: Some(0.5),
        kv_blocks: Some(4096.0),
        block_tokens: Some(32.0),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[2].1), expected);
}

#[test]
fn vllm_today() {
    let reading = read(PAGES[3].1);
    let expected = Reading {
        kind: Some(Kind::Vllm),
        waiting: Some(5.0),
        running: Some(24.0),
        kv_usage: Some(0.625),
        kv_blocks: Some(27_000.0),
        block_tokens: Some(16.0),
        lora: Some(Lora { running: 2, waiting: 1, most: 4 }),
        requests: Some(200.0),
        queue_seconds: Some(30.0),
        queue_count: Some(200.0),
        compute_seconds: Some(420.0),
        first_token_seconds: Some(50.0),
        first_token_count: Some(200.0),
        token_seconds: Some(400.0),
        token_count: Some(40_000.0),
        prefix_queries: Some(10_000.0),
        prefix_hits: Some(4_000.0),
        preemptions: Some(3.0),
        ..Reading::default()
    };
    assert_eq!(reading, expected);
    let later = Reading { prefix_queries: Some(11_000.0), prefix_hits: Some(4_750.0), ..reading };
    let rates = Rates::between(&reading, &later, Duration::from_secs(1));
    assert_eq!(rates.hit_rate, Some(0.75));
}

#[test]
fn vllm_of_old() {
    let expected = Reading {
        kind: Some(Kind::Vllm),
        waiting: Some(1.0),
        running: Some(2.0),
        kv_usage: Some(0.125),
        prefix_queries: Some(100.0),
        prefix_hits: Some(75.0),
        token_seconds: Some(5.0),
        token_count: Some(1000.0),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[4].1), expected);
}

#[test]
fn sglang() {
    let expected = Reading {
        kind: Some(Kind::Sglang),
        waiting: Some(6.0),
        running: Some(16.0),
        kv_usage: Some(0.75),
        hit_rate: Some(0.5),
        tokens_per_second: Some(1234.5),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[5].1), expected);
}

#[test]
fn text_generation_inference() {
    let expected = Reading {
        kind: Some(Kind::Tgi),
        waiting: Some(11.0),
        running: Some(32.0),
        batch_tokens: Some(65_536.0),
        queue_seconds: Some(2.5),
        queue_count: Some(10.0),
        ..Reading::default()
    };
    assert_eq!(read(PAGES[6].1), expected);
}

#[test]
fn torchserve_has_no_queue_length_but_its_waits_say_one() {
    let before = read(PAGES[7].1);
    let expected = Reading {
        kind: Some(Kind::TorchServe),
        requests: Some(400.0),
        compute_seconds: Some(8.0),
        queue_seconds: Some(1.0),
        gpu_utilization: Some(0.5),
        gpu_memory_used: Some(1024.0 * 1_048_576.0),
        ..Reading::default()
    };
    assert_eq!(before, expected);
    let now = Reading { requests: Some(410.0), queue_seconds: Some(1.5), ..before };
    let rates = Rates::between(&before, &now, Duration::from_millis(250));
    assert_eq!((rates.waiting, rates.queue_ms), (Some(2.0), Some(50.0)));
}

#[test]
fn mlserver_tells_depths_as_a_histogram() {
    let before = read(PAGES[8].1);
    let expected = Reading {
        kind: Some(Kind::MlServer),
        running: Some(9.0),
        requests: Some(300.0),
        failures: Some(4.0),
        depth_sum: Some(300.0),
        depth_count: Some(200.0),
        ..Reading::default()
    };
    assert_eq!(before, expected);
    let now = Reading { depth_sum: Some(340.0), depth_count: Some(210.0), ..before };
    assert_eq!(Rates::between(&before, &now, Duration::from_secs(1)).waiting, Some(4.0));
}

#[test]
fn gpus_of_an_exporter_are_told_apart_by_their_uuid() {
    const MIB: f64 = 1_048_576.0;
    let gpus = dcgm::read(include_bytes!("pages/dcgm.txt"));
    let uuid = |last: u8| format!("GPU-6c2f9f3e-4a1d-4a52-9d6b-0c7f0e4d1a0{last}");
    let first = dcgm::Gpu {
        uuid: uuid(1),
        pod: Some("team-a/resnet-0".to_owned()),
        memory_used: Some(20_000.0 * MIB),
        memory_total: Some(81_559.0 * MIB),
        temperature: Some(61.0),
        thermal_seconds: Some(1.5),
        xid: Some(0),
        uncorrected: Some(0.0),
        remap_failed: Some(false),
        active: Some(0.75),
        ..dcgm::Gpu::default()
    };
    let second = dcgm::Gpu {
        uuid: uuid(2),
        temperature: Some(88.0),
        xid: Some(94),
        remap_failed: Some(true),
        ..dcgm::Gpu::default()
    };
    let slice = dcgm::Gpu { uuid: uuid(3), memory_used: Some(512.0 * MIB), ..dcgm::Gpu::default() };
    assert_eq!(gpus, [first, second, slice]);
    assert_eq!(dcgm::read(PAGES[0].1), []);
}

#[test]
fn a_page_that_was_cut_anywhere_is_read_up_to_there() {
    for (kind, page) in PAGES {
        for end in 0..page.len() {
            if let Some(reading) = Reading::read(&page[..end], None) {
                assert!(reading.kind == Some(kind) || kind == Kind::TritonTrtLlm);
            }
        }
    }
}
