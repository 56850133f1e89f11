//! `penstock-gpu-test`, the program that is carried to a machine with a GPU: what it says there, and what without one.

use std::process::{Command, Output};

use crate::driver::StandIn;

fn program(arguments: &[&str], script: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-gpu-test"));
    command.args(arguments).env("PENSTOCK_STANDIN", script);
    command.output().unwrap()
}

fn on(standin: &StandIn, more: &[&str], script: &str) -> (Option<i32>, String) {
    let path = standin.path.to_str().unwrap();
    let output = program(&[&["--driver", path, "--rounds", "2"], more].concat(), script);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn without_a_device_it_is_skipped_with_a_line() {
    let (code, told) = on(&StandIn::new(""), &[], "devices=0");
    assert_eq!(code, Some(0));
    assert_eq!(told.lines().count(), 1);
    assert!(told.starts_with("skipped: no GPU is used: the driver works"), "{told}");
    let output = program(&["--driver", "/nowhere/libcuda.so.1"], "");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("skipped: no GPU is used: \"/nowhere"));
}

/// All checks, and a second process that opens an export.
#[test]
fn with_the_stand_in_all_is_exercised_and_labelled() {
    let standin = StandIn::new("");
    let nvjpeg = standin.path.to_str().unwrap();
    let (code, told) = on(&standin, &["--seed", "1", "--nvjpeg", nvjpeg], "delay=50us");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("STAND-IN: there is no GPU here"), "{told}");
    assert!(told.contains("STAND-IN: rates of this CPU, which say nothing about a GPU"), "{told}");
    assert!(told.ends_with("STAND-IN: gpu: 11 checks, 0 failed\n"), "{told}");
    assert!(told.contains("seed 1\n"), "{told}");
    for file in ["baseline", "progressive", "gray"] {
        assert!(told.contains(&format!("{file} 0.")), "{file}: {told}");
    }
    assert!(
        told.contains(
            "ok      memory: another process reads and writes what was exported: 1048576 bytes each way"
        ),
        "{told}"
    );
}

#[test]
fn what_fails_is_told_and_is_an_exit_status() {
    let standin = StandIn::new("");
    let (code, told) = on(&standin, &[], "fail=cuMemcpyDtoHAsync_v2:1@2");
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.contains("FAILED  prepare: RGB: copying from the device: cuMemcpyDtoHAsync_v2 said"),
        "{told}"
    );
    assert!(told.contains("11 checks, 1 failed"), "{told}");
    let (code, told) = on(&standin, &[], "lose=cuLaunchKernel:719@3");
    assert_eq!(code, Some(1), "{told}");
    // IPC is not possible everywhere, which is no fault of the device.
    let (code, told) = on(&standin, &[], "fail=cuIpcGetMemHandle:801");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("what was exported: not possible here: exporting memory"), "{told}");
    let (code, told) = on(&standin, &[], "fail=cuIpcOpenMemHandle_v2:1@1+");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("not possible here: refused: opening memory of another process"), "{told}");
}

/// Where there is no nvJPEG it is skipped; one that somebody names, or that is there, has to work.
#[test]
fn nvjpeg_is_skipped_only_where_there_is_none() {
    let standin = StandIn::new("");
    let own = standin.path.to_str().unwrap();
    for (script, nvjpeg, words) in [
        ("", "/nowhere/libnvjpeg.so", "nvJPEG is not used: \"/nowhere/libnvjpeg.so\" cannot be opened"),
        ("fail=nvjpegCreateEx:6@1+", own, "NVJPEG_STATUS_EXECUTION_FAILED"),
        ("nvjpeg=10.2.0", own, "has version 10"),
        ("fail=nvjpegDecode:8@2", own, "progressive: decoding a JPEG on the GPU: nvjpegDecode said"),
        ("fail=nvjpegDecode:9@3", own, "gray: decoding a JPEG on the GPU: nvjpegDecode said"),
    ] {
        let (code, told) = on(&standin, &["--nvjpeg", nvjpeg], script);
        assert_eq!(code, Some(1), "{told}");
        let line = told.lines().find(|line| line.starts_with("FAILED  nvJPEG: ")).unwrap();
        assert!(line.contains(words), "{line}");
        assert!(told.ends_with("11 checks, 1 failed\n"), "{told}");
    }
    // The loader finds no library of the usual names, unless this machine has one, which is not the stand-in's.
    let (code, told) = on(&standin, &[], "");
    if told.contains("skipped nvJPEG: nvJPEG is not used: \"libnvjpeg.so.12\"") {
        assert_eq!(code, Some(0), "{told}");
        assert!(told.ends_with("11 checks, 0 failed, 1 skipped\n"), "{told}");
    }
}

#[test]
fn wrong_usage_is_told() {
    for (arguments, told) in [
        (&["--colour"][..], "there is no \"--colour\""),
        (&["--device"], "--device needs a value"),
        (&["--seed", "x"], "\"x\" is no number"),
    ] {
        let output = program(arguments, "");
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(told) && error.contains("--help"), "{error}");
    }
    let output = program(&["--help"], "");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().contains("Exit status"));
}
