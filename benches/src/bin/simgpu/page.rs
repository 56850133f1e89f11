//! The metrics page, under the names that Triton and vLLM give to the same things, and under names of our own that say what
//! this is.

use std::fmt::Write as _;

use super::model::Counts;

/// Which server's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Triton's, for tensors.
    Triton,
    /// vLLM's, for language models.
    Vllm,
}

/// The page.
pub(crate) fn page(names: Names, model: &str, counts: &Counts) -> String {
    let mut page =
        String::from("# penstock-simgpu: a simulated GPU. No figure on this page is a real one's.\n");
    let mut row = |name: &str, kind: &str, labels: &str, value: f64| {
        let _ = writeln!(page, "# TYPE {name} {kind}\n{name}{{{labels}}} {value}");
    };
    let whole = |count: u64| count as f64;
    match names {
        Names::Triton => {
            let labels = format!("model=\"{model}\",version=\"1\"");
            row("nv_inference_request_success", "counter", &labels, whole(counts.requests));
            row("nv_inference_count", "counter", &labels, whole(counts.units));
            row("nv_inference_exec_count", "counter", &labels, whole(counts.executions));
            row("nv_inference_compute_infer_duration_us", "counter", &labels, counts.busy_s * 1e6);
            row("nv_inference_pending_request_count", "gauge", &labels, counts.waiting as f64);
        }
        Names::Vllm => {
            let labels = format!("engine=\"0\",model_name=\"{model}\"");
            row("vllm:num_requests_running", "gauge", &labels, counts.running as f64);
            row("vllm:num_requests_waiting", "gauge", &labels, counts.waiting as f64);
            row("vllm:kv_cache_usage_perc", "gauge", &labels, counts.kv_usage);
            row("vllm:prefix_cache_queries_total", "counter", &labels, whole(counts.prompt_tokens));
            row("vllm:prefix_cache_hits_total", "counter", &labels, whole(counts.cached_tokens));
            row("vllm:generation_tokens_total", "counter", &labels, whole(counts.output_tokens));
            row("vllm:num_preemptions_total", "counter", &labels, whole(counts.preemptions));
        }
    }
    row("penstock_simgpu_busy_seconds_total", "counter", "", counts.busy_s);
    row("penstock_simgpu_units_total", "counter", "", whole(counts.units));
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_names_of_the_server_that_it_stands_for_and_says_that_it_is_simulated() {
        let counts = Counts { waiting: 3, running: 2, kv_usage: 0.25, ..Counts::default() };
        let triton = page(Names::Triton, "sim", &counts);
        assert!(triton.starts_with("# penstock-simgpu: a simulated GPU"), "{triton}");
        assert!(triton.contains("\nnv_inference_pending_request_count{model=\"sim\",version=\"1\"} 3\n"));
        let vllm = page(Names::Vllm, "sim", &counts);
        assert!(vllm.contains("\nvllm:num_requests_waiting{engine=\"0\",model_name=\"sim\"} 3\n"), "{vllm}");
        assert!(vllm.contains("} 0.25\n") && !vllm.contains("nv_inference"));
    }
}
