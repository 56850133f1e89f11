//! What the STAND-IN is told: words with semicolons between them, from the variable `PENSTOCK_STANDIN` when it is
//! initialised, or by a call of `penstock_standin_script` at any time.
//!
//! | word | meaning |
//! | --- | --- |
//! | `fail=cuMemAlloc_v2:2` | the next call of this function says 2 |
//! | `fail=cuMemAlloc_v2:2@3` | the third from now on |
//! | `fail=cuMemAlloc_v2:2@3+` | the third and all after it |
//! | `lose=cuLaunchKernel:719@2` | the second says 719, and so do all calls of all functions from then on: the device is lost |
//! | `stall=cuMemcpyHtoDAsync_v2@2` | what the second puts into its stream never ends, and neither does all behind it |
//! | `delay=50ms` | whatever a stream does waits so long first; `us` for microseconds |
//! | `devices=0` | how many there are (1) |
//! | `capability=8.9` | their compute capability (9.0) |
//! | `memory=67108864` | bytes of device memory (1 GiB) |
//! | `version=12040` | what the driver says its version is (12080) |
//! | `garble` | what is copied to the host has another first byte |
//! | `nvjpeg=12.3.5` | the version of nvJPEG (12.3.5) |
//! | `shade=1` | what nvJPEG decodes is brighter by so much than what `jpeg-decoder` does (0) |
//! | `unpacked=20ms` | nvJPEG takes so long on the thread that calls it |
//! | `unpackers=1` | nvJPEG says 7 of a decode while so many threads are at one already |
//! | `backward` | threads and blocks of kernels run in the opposite order |
//!
//! A word that makes no sense fails the call that brought it.

use std::time::Duration;

/// The variable of the environment.
pub(crate) const VARIABLE: &str = "PENSTOCK_STANDIN";

/// One failure to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    call: String,
    code: i32,
    /// So many calls until then.
    after: u32,
    stays: bool,
    pub(crate) lost: bool,
}

/// What it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Script {
    faults: Vec<Fault>,
    /// Calls until one whose work never ends.
    stalls: Vec<(String, u32)>,
    pub(crate) delay: Duration,
    pub(crate) devices: i32,
    pub(crate) capability: (i32, i32),
    pub(crate) memory: usize,
    pub(crate) version: i32,
    pub(crate) backward: bool,
    pub(crate) garble: bool,
    pub(crate) nvjpeg: [i32; 3],
    pub(crate) shade: u8,
    pub(crate) unpacked: Duration,
    pub(crate) unpackers: usize,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            faults: Vec::new(),
            stalls: Vec::new(),
            delay: Duration::ZERO,
            devices: 1,
            capability: (9, 0),
            memory: 1 << 30,
            version: 12_080,
            backward: false,
            garble: false,
            nvjpeg: [12, 3, 5],
            shade: 0,
            unpacked: Duration::ZERO,
            unpackers: usize::MAX,
        }
    }
}

impl Script {
    /// Adds what `text` says; `None`: it makes no sense, and nothing was changed.
    pub(crate) fn add(&mut self, text: &str) -> Option<()> {
        let mut new = self.clone();
        for word in text.split(';').map(str::trim).filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "fail" => new.faults.push(fault(value, false)?),
                "lose" => new.faults.push(fault(value, true)?),
                "stall" => {
                    let (call, after) = value.split_once('@').unwrap_or((value, "1"));
                    new.stalls.push((call.to_owned(), after.parse().ok().filter(|after| *after > 0)?));
                }
                "delay" => new.delay = duration(value)?,
                "devices" => new.devices = value.parse().ok()?,
                "capability" => {
                    let (major, minor) = value.split_once('.')?;
                    new.capability = (major.parse().ok()?, minor.parse().ok()?);
                }
                "memory" => new.memory = value.parse().ok()?,
                "version" => new.version = value.parse().ok()?,
                "nvjpeg" => {
                    let mut numbers = value.split('.').map(|number| number.parse().ok());
                    let [Some(major), Some(minor), Some(patch)] = std::array::from_fn(|_| numbers.next()?)
                    else {
                        return None;
                    };
                    new.nvjpeg = [major, minor, patch];
                }
                "shade" => new.shade = value.parse().ok()?,
                "unpacked" => new.unpacked = duration(value)?,
                "unpackers" => new.unpackers = value.parse().ok()?,
                "backward" if value.is_empty() => new.backward = true,
                "garble" if value.is_empty() => new.garble = true,
                _ => return None,
            }
        }
        *self = new;
        Some(())
    }

    /// This function is called: whether what it starts never ends.
    pub(crate) fn stalls(&mut self, call: &str) -> bool {
        let Some((_, after)) = self.stalls.iter_mut().find(|(known, after)| known == call && *after > 0)
        else {
            return false;
        };
        *after -= 1;
        *after == 0
    }

    /// This function is called: what it has to say, and whether that is for ever.
    pub(crate) fn fault(&mut self, call: &str) -> Option<(i32, bool)> {
        let mut said = None;
        self.faults.retain_mut(|fault| {
            if fault.call != call {
                return true;
            }
            fault.after = fault.after.saturating_sub(1);
            if fault.after > 0 || said.is_some() {
                return true;
            }
            said = Some((fault.code, fault.lost));
            fault.stays
        });
        said
    }
}

fn fault(text: &str, lost: bool) -> Option<Fault> {
    let (call, rest) = text.split_once(':')?;
    let (code, when) = rest.split_once('@').unwrap_or((rest, "1"));
    let (after, stays) = match when.strip_suffix('+') {
        Some(after) => (after, true),
        None => (when, false),
    };
    let after = after.parse().ok().filter(|after| *after > 0)?;
    Some(Fault { call: call.to_owned(), code: code.parse().ok()?, after, stays, lost })
}

fn duration(text: &str) -> Option<Duration> {
    match (text.strip_suffix("ms"), text.strip_suffix("us")) {
        (Some(number), _) => number.parse().ok().map(Duration::from_millis),
        (_, Some(number)) => number.parse().ok().map(Duration::from_micros),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_come_when_they_are_told_to() {
        let mut script = Script::default();
        script
            .add("fail=a:2@2; fail=b:3@2+; lose=c:719; delay=5ms; devices=0; capability=8.9; backward")
            .unwrap();
        assert_eq!([script.fault("a"), script.fault("a"), script.fault("a")], [None, Some((2, false)), None]);
        let b = Some((3, false));
        assert_eq!([script.fault("b"), script.fault("b"), script.fault("b")], [None, b, b]);
        assert_eq!([script.fault("c"), script.fault("d")], [Some((719, true)), None]);
        assert_eq!((script.delay, script.devices, script.capability), (Duration::from_millis(5), 0, (8, 9)));
        assert!(script.backward);
    }

    #[test]
    fn nonsense_changes_nothing() {
        let mut script = Script::default();
        for text in
            ["fail=a", "fail=a:x", "fail=a:1@0", "delay=5", "colour=red", "devices=1; lose=x", "backward=1"]
        {
            assert_eq!(script.add(text), None, "{text}");
        }
        assert_eq!(script, Script::default());
    }
}
