//! The annotations of pods. The injector reads some before there is a pod, control reads others of one that runs; what a text means, and
//! whether it makes sense, is said here for both.

use super::grammar::{Parsed, either, number, port, quantity, settings, words};
use super::{Invalid, Ports, Subnet, grammar};
use crate::names::annotation;
use crate::{shown, v1};

/// Requests that may wait for an application unless it is said.
pub(super) const QUEUE: u32 = 1024;

/// An annotation of a pod: its name, and what its value is.
pub struct Key<T> {
    /// Its name.
    pub name: &'static str,
    read: fn(&str) -> Parsed<T>,
}

impl<T> Key<T> {
    const fn new(name: &'static str, read: fn(&str) -> Parsed<T>) -> Self {
        Self { name, read }
    }

    /// What the text means.
    ///
    /// # Errors
    ///
    /// It makes no sense; the error has the name and says what would.
    pub fn read(&self, text: &str) -> Result<T, Invalid> {
        (self.read)(text).map_err(|why| Invalid { name: self.name.to_owned(), why })
    }
}

/// Whether it gets a sidecar; so is the label of this name, of a pod or a namespace.
pub const INJECT: Key<bool> = Key::new(annotation::INJECT, |text| either(text, "enabled", "disabled"));
/// Whether plaintext is let in.
pub const PERMISSIVE: Key<bool> = Key::new(annotation::MTLS, |text| either(text, "permissive", "strict"));
/// Whether its application is told who calls.
pub const FORWARD_IDENTITY: Key<bool> =
    Key::new(annotation::FORWARD_IDENTITY, |text| either(text, "true", "false"));
/// How its application's requests are queued: `limit=8,queue=256`, or `limit=adaptive`.
pub const ADMISSION: Key<v1::Admission> = Key::new(annotation::ADMISSION, admission);
/// How its GPU's memory is shared with its application: `ipc`; further `ipc,nvjpeg,always,memory=256Mi,device=0`.
pub const GPU: Key<v1::Gpu> = Key::new(annotation::GPU, gpu);
/// Callers that get shared memory of their own.
pub const TENANT_REGIONS: Key<u32> = Key::new(annotation::TENANT_REGIONS, |text| number(text, 1, 64));
/// Ports whose bytes are not looked at: `3306,6379`.
pub const OPAQUE_PORTS: Key<Vec<u16>> =
    Key::new(annotation::OPAQUE_PORTS, |text| words(text)?.into_iter().map(port).collect());
/// Where its proxy is dialled, of a pod whose traffic is not redirected.
pub const INBOUND_PORT: Key<u16> = Key::new(annotation::INBOUND_PORT, port);
/// Its own ports that are reached past the proxy: `9090,7000-7100`.
pub const SKIP_INBOUND_PORTS: Key<Ports> = Key::new(annotation::SKIP_INBOUND_PORTS, ports);
/// Ports elsewhere that it reaches past the proxy.
pub const SKIP_OUTBOUND_PORTS: Key<Ports> = Key::new(annotation::SKIP_OUTBOUND_PORTS, ports);
/// Where it goes past the proxy: `169.254.0.0/16,fd00::/8`.
pub const SKIP_SUBNETS: Key<Vec<Subnet>> =
    Key::new(annotation::SKIP_SUBNETS, |text| text.split(',').map(str::parse).collect());
/// The CPU that its proxy asks for.
pub const PROXY_CPU: Key<String> = Key::new(annotation::PROXY_CPU, quantity);
/// The memory that its proxy asks for and is limited to.
pub const PROXY_MEMORY: Key<String> = Key::new(annotation::PROXY_MEMORY, quantity);

fn ports(text: &str) -> Parsed<Ports> {
    let ports: Ports = text.parse()?;
    if ports.is_empty() {
        return Err("it names no port; write 9090,7000-7100, or leave it out".to_owned());
    }
    Ok(ports)
}

fn admission(text: &str) -> Parsed<v1::Admission> {
    let mut admission = v1::Admission { limit: 0, queue: QUEUE };
    settings(text, &["limit", "queue"], |key, value| {
        match (key, value) {
            ("limit", "adaptive") => admission.limit = 0,
            ("limit", value) => admission.limit = number(value, 1, 65_536)?,
            (_, value) => admission.queue = number(value, 0, 1_048_576)?,
        }
        Ok(())
    })?;
    Ok(admission)
}

fn gpu(text: &str) -> Parsed<v1::Gpu> {
    let mut gpu = v1::Gpu::default();
    let mut ipc = false;
    for word in words(text)? {
        match word.split_once('=') {
            None if word == "ipc" => ipc = true,
            None if word == "always" => gpu.always = true,
            None if word == "nvjpeg" => gpu.nvjpeg = true,
            Some(("memory", size)) => gpu.bytes = grammar::bytes(size)?,
            Some(("device", value)) => gpu.device = number(value, 0, 255)?,
            _ => {
                return Err(format!(
                    "{} is not known; write ipc, nvjpeg, always, memory=<size> or device=<number>",
                    shown(word)
                ));
            }
        }
    }
    if ipc { Ok(gpu) } else { Err("it says no way to hand tensors over; write ipc".to_owned()) }
}

/// Whether an annotation of a pod makes sense; none: it is none that a pod's author writes.
pub fn check(name: &str, text: &str) -> Option<Result<(), Invalid>> {
    fn of<T>(key: &Key<T>, text: &str) -> Result<(), Invalid> {
        key.read(text).map(drop)
    }
    Some(match name {
        annotation::INJECT => of(&INJECT, text),
        annotation::MTLS => of(&PERMISSIVE, text),
        annotation::FORWARD_IDENTITY => of(&FORWARD_IDENTITY, text),
        annotation::ADMISSION => of(&ADMISSION, text),
        annotation::GPU => of(&GPU, text),
        annotation::TENANT_REGIONS => of(&TENANT_REGIONS, text),
        annotation::OPAQUE_PORTS => of(&OPAQUE_PORTS, text),
        annotation::INBOUND_PORT => of(&INBOUND_PORT, text),
        annotation::SKIP_INBOUND_PORTS => of(&SKIP_INBOUND_PORTS, text),
        annotation::SKIP_OUTBOUND_PORTS => of(&SKIP_OUTBOUND_PORTS, text),
        annotation::SKIP_SUBNETS => of(&SKIP_SUBNETS, text),
        annotation::PROXY_CPU => of(&PROXY_CPU, text),
        annotation::PROXY_MEMORY => of(&PROXY_MEMORY, text),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_asked_for_in_so_many_words() {
        assert_eq!(gpu("ipc"), Ok(v1::Gpu::default()));
        let all = v1::Gpu { always: true, bytes: 256 << 20, device: 1, nvjpeg: false };
        assert_eq!(gpu("ipc, always,memory=256Mi,device=1"), Ok(all));
        assert_eq!(gpu("ipc,nvjpeg"), Ok(v1::Gpu { nvjpeg: true, ..v1::Gpu::default() }));
    }

    #[test]
    fn what_is_wrong_is_named_with_the_annotation_and_what_would_be_right() {
        for (name, text, told) in [
            (annotation::INJECT, "yes", "\"yes\" is not known; write enabled or disabled"),
            (annotation::MTLS, "maybe", "\"maybe\" is not known; write permissive or strict"),
            (annotation::FORWARD_IDENTITY, "enabled", "write true or false"),
            (annotation::ADMISSION, "limit=0", "limit: \"0\" is not a whole number from 1 to 65536"),
            (annotation::ADMISSION, "rate=1", "the settings are limit, queue"),
            (annotation::GPU, "nvjpeg", "write ipc"),
            (annotation::GPU, "always", "write ipc"),
            (
                annotation::GPU,
                "ipc,fast",
                "\"fast\" is not known; write ipc, nvjpeg, always, memory=<size> or device=<number>",
            ),
            (annotation::GPU, "ipc,memory=much", "\"much\" is not a size"),
            (annotation::GPU, "ipc,device=-1", "\"-1\""),
            (annotation::TENANT_REGIONS, "0", "from 1 to 64"),
            (annotation::TENANT_REGIONS, "many", "\"many\""),
            (annotation::OPAQUE_PORTS, "3306,http", "\"http\" is not a port; write a number from 1 to 65535"),
            (annotation::OPAQUE_PORTS, "", "empty part"),
            (annotation::INBOUND_PORT, "0", "\"0\" is not a port"),
            (
                annotation::SKIP_INBOUND_PORTS,
                "http",
                "\"http\" is no port; write ports and ranges like 80,443,9000-9100",
            ),
            (
                annotation::SKIP_INBOUND_PORTS,
                " , ",
                "it names no port; write 9090,7000-7100, or leave it out",
            ),
            (
                annotation::SKIP_OUTBOUND_PORTS,
                "7100-7000",
                "\"7100-7000\" ends before it begins; write 7000-7100",
            ),
            (
                annotation::SKIP_SUBNETS,
                "10.0.0.0/33",
                "\"10.0.0.0/33\" is no subnet; write it like 10.0.0.0/8 or fd00::/8",
            ),
            (
                annotation::MTLS,
                "y".repeat(70_000).as_str(),
                "yyy\"… is not known; write permissive or strict",
            ),
            (annotation::PROXY_CPU, "much", "\"much\" is no quantity above zero; write 250m of CPU"),
            (annotation::PROXY_MEMORY, "0", "\"0\" is no quantity above zero"),
        ] {
            let error = check(name, text).unwrap().unwrap_err().to_string();
            assert!(error.starts_with(&format!("annotation {name}: ")) && error.contains(told), "{error}");
        }
    }

    #[test]
    fn ports_are_read() {
        assert_eq!(OPAQUE_PORTS.read("3306, 6379"), Ok(vec![3306, 6379]));
        let ranges = SKIP_INBOUND_PORTS.read("9090, 7000-7100").unwrap();
        assert_eq!(ranges.ranges(), [7000..=7100, 9090..=9090]);
        assert_eq!(ADMISSION.read("limit=adaptive"), Ok(v1::Admission { limit: 0, queue: QUEUE }));
        assert_eq!(ADMISSION.read("limit=8,queue=2"), Ok(v1::Admission { limit: 8, queue: 2 }));
    }
}
