//! What a model server says of itself, the same whatever serves: one table of names for each kind.

use super::{Line, lines, names};
use std::fmt;
use std::str::FromStr;

/// A kind of model server, told apart by the names on its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Triton.
    Triton,
    /// Triton with the TensorRT-LLM backend.
    TritonTrtLlm,
    /// TensorRT-LLM's own server, `trtllm-serve`.
    TrtLlmServe,
    /// vLLM.
    Vllm,
    /// SGLang, started with `--enable-metrics`.
    Sglang,
    /// Text Generation Inference.
    Tgi,
    /// TorchServe.
    TorchServe,
    /// MLServer.
    MlServer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Triton,
        Self::TritonTrtLlm,
        Self::TrtLlmServe,
        Self::Vllm,
        Self::Sglang,
        Self::Tgi,
        Self::TorchServe,
        Self::MlServer,
    ];

    /// Its name in configuration, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Triton => "triton",
            Self::TritonTrtLlm => "triton-trtllm",
            Self::TrtLlmServe => "trtllm-serve",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Tgi => "tgi",
            Self::TorchServe => "torchserve",
            Self::MlServer => "mlserver",
        }
    }

    /// Which kind a page is of; `None`: none that is known.
    pub fn detect(page: &[u8]) -> Option<Self> {
        let mut found = None;
        for name in names(page) {
            let kind = match name {
                _ if name.starts_with("nv_trt_llm_") => return Some(Self::TritonTrtLlm),
                // The backend's own metrics may follow.
                _ if name.starts_with("nv_inference_") => {
                    found = Some(Self::Triton);
                    continue;
                }
                _ if name.starts_with("vllm:") => Self::Vllm,
                _ if name.starts_with("sglang:") => Self::Sglang,
                _ if name.starts_with("trtllm_") => Self::TrtLlmServe,
                _ if name.starts_with("tgi_") => Self::Tgi,
                _ if name.starts_with("ts_inference_") || name.starts_with("ts_queue_latency_") => {
                    Self::TorchServe
                }
                _ if name.starts_with("model_infer_request_")
                    || name.starts_with("batch_request_queue")
                    || name.starts_with("parallel_request_queue") =>
                {
                    Self::MlServer
                }
                _ => continue,
            };
            return found.or(Some(kind));
        }
        found
    }

    /// Triton is Triton, whatever its backends.
    fn has_page_of(self, detected: Self) -> bool {
        let triton = |kind| matches!(kind, Self::Triton | Self::TritonTrtLlm);
        self == detected || (triton(self) && triton(detected))
    }

    fn rows(self) -> &'static [Row] {
        match self {
            // The TensorRT-LLM backend has its own queue and cache; the rest is Triton's.
            Self::Triton | Self::TritonTrtLlm => TRITON,
            Self::TrtLlmServe => TRTLLM_SERVE,
            Self::Vllm => VLLM,
            Self::Sglang => SGLANG,
            Self::Tgi => TGI,
            Self::TorchServe => TORCHSERVE,
            Self::MlServer => MLSERVER,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no [`Kind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no model server that is known; there are triton, triton-trtllm, trtllm-serve, vllm, sglang, tgi, \
     torchserve and mlserver"
)]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let known = Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(text.trim()));
        known.ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// LoRA adapters, as vLLM tells of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Lora {
    /// Adapters that requests run with.
    pub running: u32,
    /// Adapters that requests wait for.
    pub waiting: u32,
    /// How many can run at once.
    pub most: u32,
}

/// One look at a server's page. What the server does not tell is `None`.
///
/// Counters run from the start of the server and say little alone; two readings make [`Rates`](super::Rates).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// Which kind of server, when it was recognised or declared.
    pub kind: Option<Kind>,
    /// Requests that wait inside the server.
    pub waiting: Option<f64>,
    /// Requests that are executed.
    pub running: Option<f64>,
    /// Share of the KV cache in use, 0 to 1; of several engines the fullest.
    pub kv_usage: Option<f64>,
    /// Blocks of the KV cache.
    pub kv_blocks: Option<f64>,
    /// Tokens in one block.
    pub block_tokens: Option<f64>,
    /// Share of prompt tokens that were found in the prefix cache, where the server computes it itself.
    pub hit_rate: Option<f64>,
    /// Tokens generated per second, where the server computes it itself.
    pub tokens_per_second: Option<f64>,
    /// Tokens that the present batch may grow to.
    pub batch_tokens: Option<f64>,
    /// LoRA adapters.
    pub lora: Option<Lora>,
    /// GPU memory in use, bytes, all GPUs of the server.
    pub gpu_memory_used: Option<f64>,
    /// GPU memory, bytes.
    pub gpu_memory_total: Option<f64>,
    /// Share of the time that a kernel was resident, 0 to 1, of the busiest GPU. It saturates at one request: no load.
    pub gpu_utilization: Option<f64>,
    /// Pinned memory in use, bytes: the staging of host-to-device copies.
    pub pinned_used: Option<f64>,
    /// Pinned memory, bytes.
    pub pinned_total: Option<f64>,
    /// Counter: requests answered.
    pub requests: Option<f64>,
    /// Counter: requests failed.
    pub failures: Option<f64>,
    /// Counter: rows (inferences) executed.
    pub rows: Option<f64>,
    /// Counter: batches executed.
    pub executions: Option<f64>,
    /// Counter: seconds that requests waited.
    pub queue_seconds: Option<f64>,
    /// Counter: requests that [`queue_seconds`](Self::queue_seconds) is about, where that is counted apart.
    pub queue_count: Option<f64>,
    /// Counter: seconds that requests were computed.
    pub compute_seconds: Option<f64>,
    /// Counter: seconds to the first token.
    pub first_token_seconds: Option<f64>,
    /// Counter: requests that had a first token.
    pub first_token_count: Option<f64>,
    /// Counter: seconds between tokens.
    pub token_seconds: Option<f64>,
    /// Counter: gaps between tokens.
    pub token_count: Option<f64>,
    /// Counter: prompt tokens looked up in the prefix cache.
    pub prefix_queries: Option<f64>,
    /// Counter: prompt tokens found there.
    pub prefix_hits: Option<f64>,
    /// Counter: requests preempted for want of KV cache.
    pub preemptions: Option<f64>,
    /// Counter: the sum of queue depths that were observed (MLServer has no gauge).
    pub depth_sum: Option<f64>,
    /// Counter: how many observations.
    pub depth_count: Option<f64>,
}

/// How samples of one name become one number.
#[derive(Clone, Copy)]
enum Fold {
    /// Engines, models and GPUs add up.
    Sum,
    /// The fullest counts.
    Max,
}

/// Where a metric goes.
struct Row {
    /// Its name, without `_total`.
    name: &'static str,
    /// Only samples with this label.
    only: Option<(&'static str, &'static str)>,
    fold: Fold,
    /// What makes it the unit of the field.
    scale: f64,
    field: fn(&mut Reading) -> &mut Option<f64>,
}

const fn sum(name: &'static str, field: fn(&mut Reading) -> &mut Option<f64>) -> Row {
    Row { name, only: None, fold: Fold::Sum, scale: 1.0, field }
}

const fn max(name: &'static str, field: fn(&mut Reading) -> &mut Option<f64>) -> Row {
    Row { name, only: None, fold: Fold::Max, scale: 1.0, field }
}

impl Row {
    const fn scaled(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    const fn only(self, label: &'static str, value: &'static str) -> Self {
        Self { only: Some((label, value)), ..self }
    }
}

const MICRO: f64 = 1e-6;
const PERCENT: f64 = 1e-2;
const MIB: f64 = 1_048_576.0;

const TRITON: &[Row] = &[
    sum("nv_inference_pending_request_count", |r| &mut r.waiting),
    sum("nv_inference_request_success", |r| &mut r.requests),
    sum("nv_inference_request_failure", |r| &mut r.failures),
    sum("nv_inference_count", |r| &mut r.rows),
    sum("nv_inference_exec_count", |r| &mut r.executions),
    sum("nv_inference_queue_duration_us", |r| &mut r.queue_seconds).scaled(MICRO),
    sum("nv_inference_compute_input_duration_us", |r| &mut r.compute_seconds).scaled(MICRO),
    sum("nv_inference_compute_infer_duration_us", |r| &mut r.compute_seconds).scaled(MICRO),
    sum("nv_inference_compute_output_duration_us", |r| &mut r.compute_seconds).scaled(MICRO),
    max("nv_gpu_utilization", |r| &mut r.gpu_utilization),
    sum("nv_gpu_memory_used_bytes", |r| &mut r.gpu_memory_used),
    sum("nv_gpu_memory_total_bytes", |r| &mut r.gpu_memory_total),
    sum("nv_pinned_memory_pool_used_bytes", |r| &mut r.pinned_used),
    sum("nv_pinned_memory_pool_total_bytes", |r| &mut r.pinned_total),
    // The TensorRT-LLM backend. Requests wait in one queue or the other, so both add up.
    sum("nv_trt_llm_request_metrics", |r| &mut r.waiting).only("request_type", "waiting"),
    sum("nv_trt_llm_request_metrics", |r| &mut r.running).only("request_type", "scheduled"),
    max("nv_trt_llm_kv_cache_block_metrics", |r| &mut r.kv_usage).only("kv_cache_block_type", "fraction"),
    sum("nv_trt_llm_kv_cache_block_metrics", |r| &mut r.kv_blocks).only("kv_cache_block_type", "max"),
    max("nv_trt_llm_kv_cache_block_metrics", |r| &mut r.block_tokens)
        .only("kv_cache_block_type", "tokens_per"),
];

const TRTLLM_SERVE: &[Row] = &[
    sum("trtllm_num_requests_waiting", |r| &mut r.waiting),
    sum("trtllm_num_requests_running", |r| &mut r.running),
    max("trtllm_kv_cache_utilization", |r| &mut r.kv_usage),
    sum("trtllm_kv_cache_max_blocks", |r| &mut r.kv_blocks),
    max("trtllm_kv_cache_tokens_per_block", |r| &mut r.block_tokens),
];

const VLLM: &[Row] = &[
    sum("vllm:num_requests_waiting", |r| &mut r.waiting),
    sum("vllm:num_requests_running", |r| &mut r.running),
    max("vllm:kv_cache_usage_perc", |r| &mut r.kv_usage),
    max("vllm:gpu_cache_usage_perc", |r| &mut r.kv_usage),
    sum("vllm:prefix_cache_queries", |r| &mut r.prefix_queries),
    sum("vllm:prefix_cache_hits", |r| &mut r.prefix_hits),
    sum("vllm:gpu_prefix_cache_queries", |r| &mut r.prefix_queries),
    sum("vllm:gpu_prefix_cache_hits", |r| &mut r.prefix_hits),
    sum("vllm:num_preemptions", |r| &mut r.preemptions),
    sum("vllm:request_queue_time_seconds_sum", |r| &mut r.queue_seconds),
    sum("vllm:request_queue_time_seconds_count", |r| &mut r.queue_count),
    sum("vllm:request_prefill_time_seconds_sum", |r| &mut r.compute_seconds),
    sum("vllm:request_decode_time_seconds_sum", |r| &mut r.compute_seconds),
    sum("vllm:request_decode_time_seconds_count", |r| &mut r.requests),
    sum("vllm:time_to_first_token_seconds_sum", |r| &mut r.first_token_seconds),
    sum("vllm:time_to_first_token_seconds_count", |r| &mut r.first_token_count),
    sum("vllm:inter_token_latency_seconds_sum", |r| &mut r.token_seconds),
    sum("vllm:inter_token_latency_seconds_count", |r| &mut r.token_count),
    sum("vllm:time_per_output_token_seconds_sum", |r| &mut r.token_seconds),
    sum("vllm:time_per_output_token_seconds_count", |r| &mut r.token_count),
];

const SGLANG: &[Row] = &[
    sum("sglang:num_queue_reqs", |r| &mut r.waiting),
    sum("sglang:num_running_reqs", |r| &mut r.running),
    max("sglang:token_usage", |r| &mut r.kv_usage),
    max("sglang:cache_hit_rate", |r| &mut r.hit_rate),
    sum("sglang:gen_throughput", |r| &mut r.tokens_per_second),
];

const TGI: &[Row] = &[
    sum("tgi_queue_size", |r| &mut r.waiting),
    sum("tgi_batch_current_size", |r| &mut r.running),
    sum("tgi_batch_current_max_tokens", |r| &mut r.batch_tokens),
    sum("tgi_request_queue_duration_sum", |r| &mut r.queue_seconds),
    sum("tgi_request_queue_duration_count", |r| &mut r.queue_count),
];

const TORCHSERVE: &[Row] = &[
    sum("ts_inference_requests", |r| &mut r.requests),
    sum("ts_inference_latency_microseconds", |r| &mut r.compute_seconds).scaled(MICRO),
    sum("ts_queue_latency_microseconds", |r| &mut r.queue_seconds).scaled(MICRO),
    max("GPUUtilization", |r| &mut r.gpu_utilization).scaled(PERCENT),
    sum("GPUMemoryUsed", |r| &mut r.gpu_memory_used).scaled(MIB),
];

const MLSERVER: &[Row] = &[
    sum("rest_server_requests_in_progress", |r| &mut r.running),
    sum("model_infer_request_success", |r| &mut r.requests),
    sum("model_infer_request_failure", |r| &mut r.failures),
    sum("batch_request_queue_sum", |r| &mut r.depth_sum),
    sum("batch_request_queue_count", |r| &mut r.depth_count),
    sum("parallel_request_queue_sum", |r| &mut r.depth_sum),
    sum("parallel_request_queue_count", |r| &mut r.depth_count),
];

impl Reading {
    /// Reads a page as one of `kind`, or of the kind that its names show. `None`: it is no page in the text format, its
    /// kind is not recognised, or it is of another kind than was declared. A declared server whose page is still empty
    /// (TorchServe's before its first request) is read as telling nothing.
    pub fn read(page: &[u8], kind: Option<Kind>) -> Option<Self> {
        // HTML, or JSON as trtllm-serve has it beside its page.
        if matches!(page.trim_ascii_start().first(), Some(b'<' | b'{' | b'[')) {
            return None;
        }
        let kind = match (kind, Kind::detect(page)) {
            (Some(declared), Some(detected)) if !declared.has_page_of(detected) => return None,
            (Some(declared), _) => declared,
            (None, detected) => detected?,
        };
        let mut reading = Self { kind: Some(kind), ..Self::default() };
        let mut lora_at = f64::NEG_INFINITY;
        let rows = kind.rows();
        for line in lines(page) {
            // A load is finite and not negative; the buckets of histograms are most of a page and say nothing here.
            if !line.value.is_finite() || line.value < 0.0 || line.name.ends_with("_bucket") {
                continue;
            }
            // The other ranks of one SGLang engine repeat what the first says.
            if kind == Kind::Sglang && line.labels.get("tp_rank").is_some_and(|rank| rank != "0") {
                continue;
            }
            match line.name {
                "vllm:lora_requests_info" if line.value > lora_at => {
                    lora_at = line.value;
                    reading.lora = Some(lora(&line));
                }
                "vllm:cache_config_info" => cache_config(&line, &mut reading),
                _ => fold(&line, rows, &mut reading),
            }
        }
        reading.kv_usage = reading.kv_usage.map(|share| share.min(1.0));
        Some(reading)
    }
}

fn fold(line: &Line<'_>, rows: &[Row], reading: &mut Reading) {
    let name = line.name.strip_suffix("_total").unwrap_or(line.name);
    let fits = |row: &&Row| {
        row.name == name && row.only.is_none_or(|(label, value)| line.labels.get(label) == Some(value))
    };
    if let Some(row) = rows.iter().find(fits) {
        let field = (row.field)(reading);
        let value = line.value * row.scale;
        *field = Some(match (*field, row.fold) {
            (None, _) => value,
            (Some(before), Fold::Sum) => before + value,
            (Some(before), Fold::Max) => before.max(value),
        });
    }
}

/// The newest of these lines holds: its value is the time when it was written.
fn lora(line: &Line<'_>) -> Lora {
    let count = |label| {
        let names = line.labels.get(label).unwrap_or_default();
        names.split(',').filter(|name| !name.trim().is_empty()).count() as u32
    };
    Lora {
        running: count("running_lora_adapters"),
        waiting: count("waiting_lora_adapters"),
        most: line.labels.get("max_lora").and_then(|most| most.parse().ok()).unwrap_or_default(),
    }
}

/// Its labels are the message; the value is 1.
fn cache_config(line: &Line<'_>, reading: &mut Reading) {
    let number = |label| line.labels.get(label).and_then(|text| text.parse::<f64>().ok());
    reading.block_tokens = number("block_size").or(reading.block_tokens);
    if let Some(blocks) = number("num_gpu_blocks") {
        reading.kv_blocks = Some(reading.kv_blocks.unwrap_or_default() + blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names_that_are_read_again() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("caffe".parse::<Kind>().unwrap_err().to_string().contains("vllm"));
    }

    #[test]
    fn several_engines_add_up_and_the_fullest_cache_counts() {
        let page = b"vllm:num_requests_waiting{engine=\"0\"} 2\nvllm:num_requests_waiting{engine=\"1\"} 3\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.75\n";
        let reading = Reading::read(page, None).unwrap();
        assert_eq!((reading.waiting, reading.kv_usage), (Some(5.0), Some(0.75)));
        let ranks = b"sglang:num_queue_reqs{tp_rank=\"0\"} 2\nsglang:num_queue_reqs{tp_rank=\"1\"} 2\n";
        assert_eq!(Reading::read(ranks, None).unwrap().waiting, Some(2.0));
    }

    #[test]
    fn what_cannot_be_a_load_is_as_good_as_not_told() {
        let page =
            b"vllm:num_requests_waiting NaN\nvllm:num_requests_running -1\nvllm:kv_cache_usage_perc 1.5\n";
        let reading = Reading::read(page, None).unwrap();
        assert_eq!((reading.waiting, reading.running, reading.kv_usage), (None, None, Some(1.0)));
    }

    #[test]
    fn the_newest_word_about_adapters_holds() {
        let page = b"vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a,b\",waiting_lora_adapters=\"\"} 20\n\
            vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a\",waiting_lora_adapters=\"c\"} 10\n";
        let lora = Reading::read(page, None).unwrap().lora.unwrap();
        assert_eq!(lora, Lora { running: 2, waiting: 0, most: 4 });
    }

    #[test]
    fn a_page_of_nobody_we_know_is_not_read() {
        assert_eq!(Reading::read(b"go_goroutines 7\nprocess_cpu_seconds_total 1\n", None), None);
        assert_eq!(Reading::read(b"", None), None);
        let empty = Reading::read(b"", Some(Kind::TorchServe)).unwrap();
        assert_eq!(empty, Reading { kind: Some(Kind::TorchServe), ..Reading::default() });
        for (page, declared) in [
            (&b"<html>vllm: 1</html>"[..], Kind::Vllm),
            (b" [{\"iter\": 1}]", Kind::TrtLlmServe),
            (b"sglang:num_queue_reqs 1", Kind::Vllm),
        ] {
            assert_eq!(Reading::read(page, Some(declared)), None, "{declared}");
        }
        assert!(Reading::read(b"nv_inference_count 1", Some(Kind::TritonTrtLlm)).is_some());
    }
}
