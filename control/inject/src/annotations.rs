//! What a pod asks for, by its annotations and its label.

use penstock_api::names::annotation;
use penstock_redirect::{Ports, Subnet};
use serde_json::Value;

use crate::{Because, Error, Namespace, json};

/// What the injected containers are given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Arguments of `penstock-proxy init`.
    pub(crate) init: Vec<String>,
    pub(crate) cpu: Option<String>,
    pub(crate) memory: Option<String>,
    /// `penstock.io/gpu` is there.
    pub(crate) gpu: bool,
}

fn wrong(key: &str, why: impl Into<String>) -> Error {
    Error::Annotation { key: key.to_owned(), why: why.into() }
}

fn either(key: &str, text: &str, yes: &str, no: &str) -> Result<bool, Error> {
    match text.trim() {
        word if word == yes => Ok(true),
        word if word == no => Ok(false),
        other => Err(wrong(key, format!("{other:?} is not known; write {yes} or {no}"))),
    }
}

/// Why the pod is not to be injected, if it is not. Label and annotation of a pod mean the same; the pod wins over its
/// namespace.
///
/// # Errors
///
/// What it says makes no sense.
pub fn asked(pod: &Value, namespace: &Namespace) -> Result<Option<Because>, Error> {
    let key = annotation::INJECT;
    let metadata = pod.get("metadata");
    let said = ["annotations", "labels"].map(|kind| metadata.and_then(|all| all.get(kind)?.get(key)));
    let mut pods = Vec::new();
    for value in said.into_iter().flatten() {
        let text = value.as_str().ok_or_else(|| wrong(key, format!("{value} is no string; quote it")))?;
        pods.push(either(key, text, "enabled", "disabled")?);
    }
    if pods.first() != pods.last() {
        return Err(wrong(
            key,
            "the label of this name says the opposite; let both say the same, or write one",
        ));
    }
    let namespace =
        || namespace.inject.as_deref().map(|text| either(key, text, "enabled", "disabled")).transpose();
    Ok(match pods.first() {
        Some(true) => None,
        Some(false) => Some(Because::Disabled),
        None => match namespace()? {
            Some(true) => None,
            Some(false) => Some(Because::NamespaceDisabled),
            None => Some(Because::NotAsked),
        },
    })
}

/// Reads the annotations, by the types that the programs read their options with, where there are such.
pub(crate) fn read(pod: &Value) -> Result<Options, Error> {
    let mut options = Options::default();
    if let Some(all) = pod.pointer("/metadata/annotations").and_then(Value::as_object) {
        // Kubernetes takes strings alone, and would say so with less about where.
        if let Some((key, value)) =
            all.iter().find(|(key, value)| key.starts_with("penstock.io/") && !value.is_string())
        {
            return Err(wrong(key, format!("{value} is no string; quote it")));
        }
    }
    for (key, option) in [
        (annotation::SKIP_INBOUND_PORTS, "--skip-inbound-ports"),
        (annotation::SKIP_OUTBOUND_PORTS, "--skip-outbound-ports"),
    ] {
        if let Some(text) = json::annotation(pod, key) {
            let ports: Ports = text.parse().map_err(|why: String| wrong(key, why))?;
            if ports.is_empty() {
                return Err(wrong(key, "it names no port; write 9090,7000-7100, or leave it out"));
            }
            options.init.push(format!("{option}={ports}"));
        }
    }
    if let Some(text) = json::annotation(pod, annotation::SKIP_SUBNETS) {
        let subnets: Result<Vec<Subnet>, String> = text.split(',').map(str::parse).collect();
        let subnets = subnets.map_err(|why| wrong(annotation::SKIP_SUBNETS, why))?;
        let subnets: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
        options.init.push(format!("--skip-subnets={}", subnets.join(",")));
    }
    if let Some(text) = json::annotation(pod, annotation::OPAQUE_PORTS) {
        let key = annotation::OPAQUE_PORTS;
        let numbers = text.split(',').map(|word| word.trim().parse::<u16>().ok().filter(|port| *port > 0));
        if numbers.into_iter().any(|port| port.is_none()) {
            return Err(wrong(key, format!("{text:?} is no list of ports; write 3306,6379")));
        }
    }
    if let Some(text) = json::annotation(pod, annotation::MTLS) {
        either(annotation::MTLS, text, "permissive", "strict")?;
    }
    if let Some(text) = json::annotation(pod, annotation::GPU) {
        if !text.split(',').any(|word| word.trim() == "ipc") {
            return Err(wrong(annotation::GPU, "it says no way to hand tensors over; write ipc"));
        }
        options.gpu = true;
    }
    if json::annotation(pod, annotation::INBOUND_PORT).is_some() {
        return Err(wrong(
            annotation::INBOUND_PORT,
            "it is of pods whose traffic is not redirected, and an injected pod's is; leave it out",
        ));
    }
    for (key, place) in
        [(annotation::PROXY_CPU, &mut options.cpu), (annotation::PROXY_MEMORY, &mut options.memory)]
    {
        if let Some(text) = json::annotation(pod, key) {
            if !quantity(text) {
                return Err(wrong(
                    key,
                    format!("{text:?} is no quantity above zero; write 250m of CPU, 512Mi of memory"),
                ));
            }
            *place = Some(text.to_owned());
        }
    }
    Ok(options)
}

/// A positive quantity as Kubernetes writes it, without exponents.
fn quantity(text: &str) -> bool {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"].contains(&unit)
        && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && digits.parse::<f64>().is_ok_and(|number| number > 0.0)
}

#[cfg(test)]
mod tests {
    use super::quantity;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        assert!(["250m", "1", "0.5", "512Mi", "2Gi", "1G"].into_iter().all(quantity));
        assert!(
            ["", "0", "-1", "1 Gi", "Mi", "1GiB", "inf", "1e3", "1.2.3"]
                .into_iter()
                .all(|text| !quantity(text))
        );
    }
}
