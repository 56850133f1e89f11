//! `penstock inject` and `uninject`: the sidecar in files, without a cluster. What is written is what `penstock_inject` makes
//! of each pod; everything else passes as it is, but for comments and the order of keys.

use std::collections::HashMap;
use std::io::Read;

use penstock_inject::{Because, Namespace, Outcome, Settings, pods, remake};
use serde_json::Value;

use crate::failure::Failure;
use crate::output::{Format, Output};

/// Options of `penstock uninject`.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// A file of YAML or JSON with one or more objects; - is standard input; may be repeated
    #[arg(long = "filename", short, value_name = "FILE", required = true)]
    files: Vec<String>,
}

/// Options of `penstock inject`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    files: Files,
    /// The proxy's image [default: penstock.io/proxy:VERSION]
    #[arg(long, value_name = "IMAGE")]
    proxy_image: Option<String>,
    /// Where proxies find control [default: penstock-control.penstock-system.svc:15010]
    #[arg(long, value_name = "HOST:PORT")]
    control_address: Option<String>,
    /// The mesh's trust domain [default: cluster.local]
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<String>,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<u8, Failure> {
    let mut settings = Settings::default();
    for (given, setting) in [
        (&args.proxy_image, &mut settings.image),
        (&args.control_address, &mut settings.control),
        (&args.trust_domain, &mut settings.trust_domain),
    ] {
        if let Some(given) = given {
            setting.clone_from(given);
        }
    }
    let documents = read(&args.files)?;
    let (objects, told) = inject(documents, &settings)?;
    print(&objects, &told, output)
}

pub(crate) fn undo(args: &Files, output: Output) -> Result<u8, Failure> {
    let (objects, told) = uninject(read(args)?)?;
    print(&objects, &told, output)
}

/// An object, and where it was read.
struct Document {
    /// `web.yaml, document 2`
    at: String,
    object: Value,
}

fn read(args: &Files) -> Result<Vec<Document>, Failure> {
    let mut documents = Vec::new();
    for file in &args.files {
        let text = if file == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        let name = if file == "-" { "standard input" } else { file };
        let text = text.map_err(|error| Failure::Problem(format!("{name}: cannot be read: {error}")))?;
        documents.extend(parse(name, &text)?);
    }
    Ok(documents)
}

fn parse(name: &str, text: &str) -> Result<Vec<Document>, Failure> {
    // As Kubernetes reads it: `defaultMode: 0440` is octal.
    let options = serde_saphyr::options! { with_snippet: false, legacy_octal_numbers: true };
    let values: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
        Failure::Problem(format!("{name}: this is no YAML or JSON: {}", error.without_snippet()))
    })?;
    let mut documents = Vec::new();
    for (index, object) in values.into_iter().enumerate() {
        let at = format!("{name}, document {}", index + 1);
        match object {
            Value::Null => {}
            Value::Object(_) => documents.push(Document { at, object }),
            _ => return Err(Failure::Problem(format!("{at}: this is no Kubernetes object"))),
        }
    }
    Ok(documents)
}

/// Who hands a file to `inject` asks for it, so pods need not; what says `disabled`, a Namespace in the files too, stays as
/// it is.
fn inject(documents: Vec<Document>, settings: &Settings) -> Result<(Vec<Value>, Vec<String>), Failure> {
    let mut namespaces = HashMap::new();
    for Document { object, .. } in &documents {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        if text("/kind").as_deref() == Some("Namespace")
            && let Some(name) = text("/metadata/name")
        {
            let inject = text("/metadata/labels/penstock.io~1inject");
            let enforce = text("/metadata/labels/pod-security.kubernetes.io~1enforce");
            namespaces.insert(name, Namespace { inject, enforce });
        }
    }
    each(documents, |pod, place| {
        let mut namespace =
            namespaces.get(place.namespace.as_deref().unwrap_or("default")).cloned().unwrap_or_default();
        namespace.inject.get_or_insert_with(|| "enabled".to_owned());
        let outcome =
            penstock_inject::inject(pod, &namespace, settings).map_err(|error| error.to_string())?;
        Ok(match outcome {
            Outcome::Injected(injected) => {
                let warnings =
                    injected.warnings.iter().map(|warning| format!("{}: warning: {warning}", place.of));
                let told = std::iter::once(format!("{}: injected", place.of)).chain(warnings).collect();
                (Some(injected.pod), told)
            }
            Outcome::Not(because @ Because::Already) => {
                (None, vec![format!("{}: unchanged: {because}", place.of)])
            }
            Outcome::Not(because) => (None, vec![format!("{}: not injected: {because}", place.of)]),
        })
    })
}

fn uninject(documents: Vec<Document>) -> Result<(Vec<Value>, Vec<String>), Failure> {
    each(documents, |pod, place| {
        let pod = penstock_inject::uninject(pod);
        let word = if pod.is_some() { "uninjected" } else { "unchanged: nothing was injected" };
        Ok((pod, vec![format!("{}: {word}", place.of)]))
    })
}

fn each(
    documents: Vec<Document>,
    mut make: impl FnMut(&Value, &penstock_inject::Place) -> Result<(Option<Value>, Vec<String>), String>,
) -> Result<(Vec<Value>, Vec<String>), Failure> {
    let (mut objects, mut told) = (Vec::new(), Vec::new());
    for Document { at, mut object } in documents {
        for place in pods(&object) {
            remake(&mut object, &place, |pod| {
                let (made, words) = make(pod, &place)?;
                told.extend(words);
                Ok(made)
            })
            .map_err(|why: String| {
                let within =
                    if place.pointer.is_empty() { String::new() } else { format!(" at {}", place.pointer) };
                Failure::Problem(format!("{at}, {}{within}: {why}", place.of))
            })?;
        }
        objects.push(object);
    }
    Ok((objects, told))
}

fn print(objects: &[Value], told: &[String], output: Output) -> Result<u8, Failure> {
    // A table of manifests means nothing; YAML is what kubectl takes.
    let format = if output.format == Format::Table { Format::Yaml } else { output.format };
    let output = Output { format, ..output };
    for object in objects {
        output.object(object)?;
    }
    for line in told {
        eprintln!("{line}");
    }
    Ok(crate::failure::exit::FINE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FILE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: demo}
spec:
  future: {field: 1}
  template:
    spec:
      containers: [{name: web, image: web}]
---
{apiVersion: v1, kind: List, items: [{apiVersion: batch/v1, kind: CronJob, metadata: {name: night}, spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: a}]}}}}}}]}
";

    #[test]
    fn the_pod_is_exactly_what_the_patch_makes_of_it_and_uninject_gives_back_the_file() {
        let settings = Settings::default();
        let before: Vec<Value> = parse("web.yaml", FILE).unwrap().into_iter().map(|one| one.object).collect();
        let (after, told) = inject(parse("web.yaml", FILE).unwrap(), &settings).unwrap();
        assert_eq!(told, ["Deployment demo/web: injected", "CronJob night: injected"]);
        assert_eq!(after[0], before[0]);
        let mut pod = before[1].pointer("/spec/template").unwrap().clone();
        let namespace = Namespace { inject: Some("enabled".into()), ..Namespace::default() };
        let Ok(Outcome::Injected(injected)) = penstock_inject::inject(&pod, &namespace, &settings) else {
            panic!()
        };
        // From its JSON, as an API server would.
        let patch: json_patch::Patch =
            serde_json::from_value(serde_json::to_value(&injected.patch).unwrap()).unwrap();
        json_patch::patch(&mut pod, &patch).unwrap();
        assert_eq!(after[1].pointer("/spec/template").unwrap(), &pod);

        let again = |objects: Vec<Value>| {
            objects.into_iter().map(|object| Document { at: "web.yaml".into(), object }).collect::<Vec<_>>()
        };
        let (twice, told) = inject(again(after.clone()), &settings).unwrap();
        assert_eq!(twice, after);
        assert!(told[0].contains("unchanged"), "{told:?}");
        assert_eq!(uninject(again(after)).unwrap().0, before);
    }

    #[test]
    fn an_error_names_file_document_and_field() {
        let file = FILE.replace(
            "    spec:\n      containers",
            "    metadata: {annotations: {penstock.io/mtls: maybe}}\n    spec:\n      containers",
        );
        let Err(failure) = inject(parse("web.yaml", &file).unwrap(), &Settings::default()) else { panic!() };
        assert_eq!(
            failure.to_string(),
            "web.yaml, document 2, Deployment demo/web at /spec/template: annotation penstock.io/mtls: \"maybe\" is not \
             known; write permissive or strict"
        );
        let failure = parse("web.yaml", "a: [").err().unwrap().to_string();
        assert!(failure.starts_with("web.yaml: this is no YAML or JSON"), "{failure}");
        let failure = parse("web.yaml", "a: 1\n---\n- 1").err().unwrap().to_string();
        assert_eq!(failure, "web.yaml, document 2: this is no Kubernetes object");
    }

    #[test]
    fn a_namespace_in_the_file_that_says_no_is_heard() {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "demo", "labels": {"penstock.io/inject": "disabled"}}});
        let mut documents = parse("web.yaml", FILE).unwrap();
        documents.push(Document { at: "n".into(), object: namespace });
        let (_, told) = inject(documents, &Settings::default()).unwrap();
        assert!(told[0].contains("not injected: the namespace says"), "{told:?}");
    }
}
