//! What a pod asks for, by its annotations and its label.

use penstock_api::annotation::{Invalid, Subnet, pod};
use penstock_api::names::annotation;
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
    Error::Annotation(Invalid { name: key.to_owned(), why: why.into() })
}

/// Why the pod is not to be injected, if it is not. Label and annotation of a pod mean the same; the pod wins over its
/// namespace.
///
/// # Errors
///
/// What it says makes no sense.
pub fn asked(of: &Value, namespace: &Namespace) -> Result<Option<Because>, Error> {
    let key = annotation::INJECT;
    let metadata = of.get("metadata");
    let said = ["annotations", "labels"].map(|kind| metadata.and_then(|all| all.get(kind)?.get(key)));
    let mut pods = Vec::new();
    for value in said.into_iter().flatten() {
        let text = value.as_str().ok_or_else(|| wrong(key, format!("{value} is no string; quote it")))?;
        pods.push(pod::INJECT.read(text)?);
    }
    if pods.first() != pods.last() {
        return Err(wrong(
            key,
            "the label of this name says the opposite; let both say the same, or write one",
        ));
    }
    let namespace = || namespace.inject.as_deref().map(|text| pod::INJECT.read(text)).transpose();
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

/// Reads the annotations. Those that say nothing about how a pod is injected are left to control, which tells of nonsense without keeping the
/// pod from being made.
pub(crate) fn read(of: &Value) -> Result<Options, Error> {
    let mut options = Options::default();
    if let Some(all) = of.pointer("/metadata/annotations").and_then(Value::as_object) {
        // Kubernetes takes strings alone, and would say so with less about where.
        if let Some((key, value)) =
            all.iter().find(|(key, value)| key.starts_with("penstock.io/") && !value.is_string())
        {
            return Err(wrong(key, format!("{value} is no string; quote it")));
        }
    }
    for (key, option) in [
        (pod::SKIP_INBOUND_PORTS, "--skip-inbound-ports"),
        (pod::SKIP_OUTBOUND_PORTS, "--skip-outbound-ports"),
    ] {
        if let Some(ports) = said(of, &key)? {
            options.init.push(format!("{option}={ports}"));
        }
    }
    if let Some(subnets) = said(of, &pod::SKIP_SUBNETS)? {
        let subnets: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
        options.init.push(format!("--skip-subnets={}", subnets.join(",")));
    }
    said(of, &pod::OPAQUE_PORTS)?;
    said(of, &pod::PERMISSIVE)?;
    options.gpu = said(of, &pod::GPU)?.is_some();
    if json::annotation(of, annotation::INBOUND_PORT).is_some() {
        return Err(wrong(
            annotation::INBOUND_PORT,
            "it is of pods whose traffic is not redirected, and an injected pod's is; leave it out",
        ));
    }
    options.cpu = said(of, &pod::PROXY_CPU)?;
    options.memory = said(of, &pod::PROXY_MEMORY)?;
    Ok(options)
}

/// What an annotation says, if it is there.
fn said<T>(of: &Value, key: &pod::Key<T>) -> Result<Option<T>, Error> {
    Ok(json::annotation(of, key.name).map(|text| key.read(text)).transpose()?)
}

#[cfg(test)]
mod tests {
    use penstock_api::annotation::ALL;

    use super::*;

    #[test]
    fn what_holds_without_an_annotation_is_what_the_table_says() {
        let settings = crate::Settings::default();
        for (name, defaults) in [
            (annotation::PROXY_CPU, vec![settings.cpu]),
            (annotation::PROXY_MEMORY, vec![settings.memory, settings.memory_limit]),
        ] {
            let told = ALL.iter().find(|one| one.name == name).unwrap().without;
            assert!(defaults.iter().all(|default| told.contains(default)), "{name}: {told}");
        }
    }
}
