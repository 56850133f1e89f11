//! A second process, which is given memory of the first.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use penstock_kernels::cuda::{Driver, IpcHandle, Kind, detect};

use crate::Options;
use crate::bed::{Bed, Failure, wrong};

/// The word by which this program is told to be the second process.
pub(crate) const WORD: &str = "peer";
const BYTES: usize = 1 << 20;

/// Exports memory, lets another process read and change it, and looks at it again.
pub(crate) fn check(bed: &Bed, options: &Options) -> Result<String, Failure> {
    let sent = bed.dice(20).bytes(BYTES);
    let memory = bed.upload(sent.clone())?;
    let handle = match memory.export() {
        Ok(handle) => handle,
        Err(error) if error.kind() == Kind::Refused => return Ok(format!("not possible here: {error}")),
        Err(error) => return Err(error.into()),
    };
    if bed.context.open_ipc(&handle, BYTES).is_ok() {
        return Err(wrong("a process could open its own export, which no driver allows"));
    }
    let path = options.driver.clone().unwrap_or_default();
    let mut peer = Command::new(std::env::current_exe()?)
        .arg(WORD)
        .args([options.device.to_string(), BYTES.to_string(), path.to_string_lossy().into_owned()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut to) = peer.stdin.take() {
        to.write_all(&handle.0)?;
    }
    let output = peer.wait_with_output()?;
    let told = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if told.starts_with("refused: ") {
        return Ok(format!("not possible here: {told}"));
    }
    if !output.status.success() {
        return Err(wrong(format!("the second process ended with {}: {told}", output.status)));
    }
    // It inverted every byte.
    let found = bed.download(&memory)?;
    if found.iter().zip(&sent).any(|(found, sent)| *found != !sent) {
        return Err(wrong("what the second process wrote is not there"));
    }
    Ok(format!("{BYTES} bytes each way"))
}

/// The second process.
pub(crate) fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Driver(error)) if error.kind() == Kind::Refused => {
            println!("refused: {error}");
            ExitCode::FAILURE
        }
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let mut words = std::env::args().skip(2);
    let mut number =
        || words.next().and_then(|word| word.parse::<usize>().ok()).ok_or_else(|| wrong("no number"));
    let (device, bytes) = (number()?, number()?);
    let path = words.next().filter(|path| !path.is_empty()).map(PathBuf::from);
    let driver = match path {
        Some(path) => Driver::open(&path).map_err(|absent| wrong(absent.to_string()))?,
        None => detect(|absent| println!("{absent}")).ok_or_else(|| wrong("no driver"))?,
    };
    let mut handle = [0; 64];
    std::io::stdin().read_exact(&mut handle)?;
    let context = driver.context(device as u32)?;
    let kernels = penstock_kernels::cuda::Kernels::load(&context)?;
    let bed = Bed::new(context.clone(), kernels, 0)?;
    let memory = context.open_ipc(&IpcHandle(handle), bytes)?;
    let inverted: Vec<u8> = bed.download(&memory)?.into_iter().map(|byte| !byte).collect();
    bed.stream.upload(inverted.into(), &memory, 0)?.wait()?;
    Ok(())
}
