//! The GPU suite, as one program that can be carried to a machine with a GPU: it needs nothing there but the driver and
//! a libc.
//!
//! In: a device. Out: a line for each check, a table of rates beside the device's own copy rate, and an exit status.
//! Without a device: one line that says so, and success. With the STAND-IN driver in the place of a real one it says
//! STAND-IN wherever somebody might take its figures for a GPU's.

mod bed;
mod checks;
mod jpegs;
mod peer;
mod rates;

use std::path::PathBuf;
use std::process::ExitCode;

use penstock_kernels::cuda::{Driver, Kernels, detect};

use bed::{Bed, Failure, Said};

const USAGE: &str = "\
Checks the kernels and the memory of a GPU, and measures them.

Usage: penstock-gpu-test [--device N] [--driver PATH] [--nvjpeg PATH] [--seed N] [--rounds N]

  --device N     which device (0)
  --driver PATH  another driver than libcuda.so.1, such as the STAND-IN of the tests
  --nvjpeg PATH  another library than libnvjpeg.so.12, .13 or .11; it has to be there
  --seed N       of the random inputs; a fresh one unless given, which is printed
  --rounds N     random batches of each check (20)

Exit status: 0 no check failed, or there is no device; 1 a check failed; 2 wrong usage.
What could not be checked, such as nvJPEG where there is none, is counted as skipped.

Example: penstock-gpu-test --device 1 --rounds 100";

/// What the command line says.
struct Options {
    device: u32,
    driver: Option<PathBuf>,
    nvjpeg: Option<PathBuf>,
    seed: u64,
    rounds: u32,
}

fn options() -> Result<Options, String> {
    let mut options = Options { device: 0, driver: None, nvjpeg: None, seed: fresh(), rounds: 20 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
        match word.as_str() {
            "--device" => options.device = number(value()?)?.try_into().map_err(|_| "no such device")?,
            "--driver" => options.driver = Some(value()?.into()),
            "--nvjpeg" => options.nvjpeg = Some(value()?.into()),
            "--seed" => options.seed = number(value()?)?,
            "--rounds" => options.rounds = number(value()?)?.try_into().map_err(|_| "too many rounds")?,
            other => return Err(format!("there is no {other:?}")),
        }
    }
    Ok(options)
}

/// A number that is another each time.
fn fresh() -> u64 {
    use std::io::Read as _;
    let mut bytes = [0; 8];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if read.is_ok() { u64::from_le_bytes(bytes) } else { u64::from(std::process::id()) }
}

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if std::env::args().nth(1).as_deref() == Some(peer::WORD) {
        return peer::main();
    }
    let options = match options() {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("penstock-gpu-test: {wrong}; --help says what there is");
            return ExitCode::from(2);
        }
    };
    let driver = match &options.driver {
        Some(path) => Driver::open(path).map_err(|absent| println!("skipped: {absent}")).ok(),
        None => detect(|absent| println!("skipped: {absent}")),
    };
    let Some(driver) = driver else { return ExitCode::SUCCESS };
    match run(&driver, &options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(failure) => {
            println!("FAILED  {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Runs everything; returns how much failed.
fn run(driver: &Driver, options: &Options) -> Result<u32, Failure> {
    let (major, minor) = driver.version()?;
    for device in driver.devices()? {
        let chosen = if device.number == options.device { ", the one that is tested" } else { "" };
        let capability = format!("sm_{}{}", device.capability.0, device.capability.1);
        println!(
            "device {}: {}, {capability}, {} MiB{chosen}",
            device.number,
            device.name,
            device.memory >> 20
        );
    }
    let context = driver.context(options.device)?;
    let kernels = Kernels::load(&context)?;
    let from = if kernels.are_machine_code() {
        "machine code for this device"
    } else {
        "PTX, compiled by the driver"
    };
    println!("driver for CUDA {major}.{minor}; kernels: {from}; seed {}", options.seed);
    let standin = context.device().name.starts_with("STAND-IN");
    if standin {
        println!("STAND-IN: there is no GPU here; what follows exercises the code, and measures this CPU");
    }
    let bed = Bed::new(context, kernels, options.seed)?;
    let (mut failed, mut skipped) = (0, 0);
    let mut tell = |name: &str, said: Result<Said, Failure>| match said {
        Ok(Said::Done(how)) => println!("ok      {name}: {how}"),
        Ok(Said::Skipped(why)) => {
            println!("skipped {name}: {why}");
            skipped += 1;
        }
        Err(failure) => {
            println!("FAILED  {name}: {failure}");
            failed += 1;
        }
    };
    for (name, check) in checks::ALL {
        tell(name, check(&bed, options.rounds).map(Said::Done));
    }
    let peer = peer::check(&bed, options).map(Said::Done);
    tell("memory: another process reads and writes what was exported", peer);
    tell("nvJPEG", jpegs::check(&bed, options.nvjpeg.as_deref()));
    println!();
    rates::table(&bed, standin)?;
    println!();
    let label = if standin { "STAND-IN: " } else { "" };
    let of_them = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    println!("{label}gpu: {} checks, {failed} failed{of_them}", checks::ALL.len() + 2);
    Ok(failed)
}
