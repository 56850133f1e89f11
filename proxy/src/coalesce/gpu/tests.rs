//! What is decided of a model, without a device.

use super::execute::Execution;
use super::*;
use crate::failure::Failure;
use penstock_inference::oip::Tensor;

fn run(server: &str) -> Execution<'static> {
    let server = server.parse().unwrap();
    Execution {
        model: ("m", ""),
        server,
        bytes: 1 << 20,
        rows: 4,
        per_row: vec![1 << 18],
        is_repeatable: true,
    }
}

fn answered(values: &[f32]) -> Result<Answered, Trouble> {
    let outputs = vec![Tensor::fp32("y", vec![values.len() as u64], values.iter().copied())];
    let response = InferResponse { outputs, ..InferResponse::default() };
    Ok(Answered { response, headers: HeaderMap::new() })
}

#[test]
fn a_model_is_tested_once_on_each_server_and_goes_over_the_gpu_only_if_it_answers_the_same() {
    let gpu = Gpu::new(PathBuf::new(), None);
    let (here, there) = (run("127.0.0.1:8000"), run("127.0.0.2:8000"));
    let at = Duration::from_secs;
    let sequence = Execution { is_repeatable: false, ..run("127.0.0.1:8000") };
    assert_eq!(gpu.decide(&sequence, true, at(1), 0.5), Turn::Plain, "what has state is executed once");
    assert_eq!(gpu.decide(&here, true, at(1), 0.5), Turn::Both);
    assert_eq!(gpu.decide(&here, true, at(2), 0.5), Turn::Plain, "it is being tested");
    assert_eq!(gpu.decide(&there, true, at(2), 0.5), Turn::Both);
    assert_eq!(gpu.decide(&there, true, at(40), 0.5), Turn::Both, "nobody has finished the test");
    gpu.tested(&here, &answered(&[1.0, 2.0]), &answered(&[1.0, 2.0]));
    assert_eq!(gpu.decide(&here, true, at(3), 0.5), Turn::Device);
    assert_eq!(gpu.decide(&here, false, at(3), 0.5), Turn::Host, "both are measured in turns");
    gpu.tested(&there, &answered(&[1.0, 2.0]), &answered(&[1.0, 2.5]));
    assert_eq!(gpu.decide(&there, true, at(99), 0.5), Turn::Plain, "it answered something else");
    let failed = || Err(Trouble::Way(Failure::new(penstock_api::Reason::UpstreamReset, "")));
    gpu.tested(&here, &failed(), &answered(&[1.0]));
    assert_eq!(gpu.decide(&here, true, at(4), 0.5), Turn::Both, "nothing is known after a failure");
}

#[test]
fn models_beyond_the_bound_do_without() {
    let gpu = Gpu::new(PathBuf::new(), None);
    let server = "127.0.0.1:8000".parse().unwrap();
    for number in 0..MAX_MODELS {
        assert!(gpu.model(server, &number.to_string(), |_| ()).is_some());
    }
    assert!(gpu.model(server, "one more", |_| ()).is_none());
    assert!(gpu.model(server, "7", |_| ()).is_some());
    assert_eq!(gpu.decide(&run("127.0.0.1:8000"), true, Duration::ZERO, 0.5), Turn::Plain);
}

#[test]
fn without_a_device_nothing_is_asked_of_it() {
    let gpu = Gpu::new(PathBuf::from("/nowhere"), None);
    assert!(gpu.context().is_none() && gpu.staging().is_none());
    gpu.off("as a test");
    assert!(gpu.device().is_none());
}

#[test]
fn what_nvjpeg_says_of_a_file_says_nothing_of_the_next() {
    let gpu = Gpu::new(PathBuf::new(), None);
    let at = Duration::from_secs;
    let said = |status| JpegError::Said { doing: "", call: "", status };
    let rests = |gpu: &Gpu| gpu.jpegs_rest_until.load(Relaxed);
    for of_a_file in [said(3), said(4), said(9), said(10), JpegError::Busy, JpegError::Sampling] {
        gpu.fails(&Unfit::Jpeg(of_a_file), at(1));
    }
    assert_eq!(rests(&gpu), 0);
    gpu.fails(&Unfit::Jpeg(said(5)), at(1));
    assert_eq!(rests(&gpu), 11_000, "there is no memory now");
    gpu.fails(&Unfit::Jpeg(said(6)), at(21));
    gpu.fails(&Unfit::Late, at(22));
    assert_eq!(rests(&gpu), 32_000, "the picture that is built in was not decoded either");
    gpu.fails(&Unfit::Jpeg(said(7)), at(23));
    assert_eq!(rests(&gpu), FOR_EVER, "it is not for this device");
    gpu.fails(&Unfit::Jpeg(said(5)), at(30));
    assert_eq!(rests(&gpu), FOR_EVER);
    assert_eq!(gpu.rests_until.load(Relaxed), 0, "the GPU is well");
}

#[test]
fn what_cannot_be_a_files_fault_is_for_ever() {
    let said = |status| Unfit::Jpeg(JpegError::Said { doing: "", call: "", status });
    for unfit in [said(1), said(2), said(7), said(8), said(99), Unfit::Pixels] {
        let gpu = Gpu::new(PathBuf::new(), None);
        gpu.fails(&unfit, Duration::from_secs(1));
        assert_eq!(gpu.jpegs_rest_until.load(Relaxed), FOR_EVER, "{unfit}");
        assert_eq!(gpu.rests_until.load(Relaxed), 0, "{unfit}: the GPU is well");
    }
}

#[test]
fn nvjpeg_is_looked_for_by_one_thread() {
    let gpu = Gpu::new(PathBuf::new(), None);
    assert!(gpu.is_first_to_look() && !gpu.is_first_to_look() && !gpu.is_first_to_look());
}
