//! What `penstock install` prints is what `manifests/install` has, and agrees with itself and with the programs.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "what fails here fails the test")]

use std::path::PathBuf;
use std::process::Command;

use penstock_api::names::port;
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../manifests/install")
}

fn printed(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_penstock")).args(["install"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn objects() -> Vec<Value> {
    printed(&[]).split("---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

fn object(kind: &str, name: &str) -> Value {
    let found = objects().into_iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn the_program_and_the_base_for_kustomize_are_the_same_word_for_word() {
    let base: Value =
        serde_saphyr::from_str(&std::fs::read_to_string(folder().join("kustomization.yaml")).unwrap())
            .unwrap();
    let named: Vec<String> =
        base["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap().to_owned()).collect();
    let files: Vec<String> =
        named.iter().map(|file| std::fs::read_to_string(folder().join(file)).unwrap()).collect();
    assert_eq!(printed(&[]), files.join("---\n"));
    // No file lies beside them that nobody installs.
    let mut there: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "kustomization.yaml")
        .collect();
    there.sort();
    let mut named = named;
    named.sort();
    assert_eq!(there, named);
}

#[test]
fn images_are_of_this_version() {
    let text = printed(&[]);
    let version = env!("CARGO_PKG_VERSION");
    for image in ["control", "proxy"] {
        let of = format!("penstock.io/{image}:");
        let found: Vec<_> = text.match_indices(&of).map(|(at, _)| &text[at + of.len()..]).collect();
        assert!(found.len() == 1 && found[0].starts_with(&format!("{version}\n")), "{image}");
    }
}

#[test]
fn everything_carries_the_mark_of_the_installation() {
    for object in objects() {
        let labels = &object["metadata"]["labels"];
        assert_eq!(labels["app.kubernetes.io/part-of"], "penstock", "{object}");
    }
}

/// The names and ports that one object has of another.
#[test]
fn objects_agree_with_each_other_and_with_the_code() {
    let deployment = object("Deployment", "penstock-control");
    let pod = &deployment["spec"]["template"];
    let container = &pod["spec"]["containers"][0];
    let port_of = |name: &str| {
        let ports = container["ports"].as_array().unwrap().iter();
        ports.into_iter().find(|port| port["name"] == name).unwrap()["containerPort"].as_u64().unwrap()
    };
    assert_eq!(port_of("grpc-push"), u64::from(port::CONTROL));
    assert_eq!(port_of("http-api"), u64::from(port::CONTROL_API));
    let args: Vec<&str> =
        container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    assert!(args.contains(&format!("--listen=0.0.0.0:{}", port_of("grpc-push")).as_str()), "{args:?}");
    assert!(args.contains(&format!("--webhook=0.0.0.0:{}", port_of("https-webhook")).as_str()), "{args:?}");
    // The API asks nobody who he is, so it stays on loopback.
    assert!(!args.iter().any(|arg| arg.starts_with("--api")), "{args:?}");

    for name in ["penstock-control", "penstock-webhook"] {
        let service = object("Service", name);
        let selector = service["spec"]["selector"].as_object().unwrap();
        assert!(selector.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value), "{name}");
        for port in service["spec"]["ports"].as_array().unwrap() {
            port_of(port["targetPort"].as_str().unwrap());
        }
    }
    let policy = object("NetworkPolicy", "penstock-control");
    let open: Vec<u64> = policy["spec"]["ingress"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|rule| rule["ports"].as_array().unwrap())
        .map(|port| port["port"].as_u64().unwrap())
        .collect();
    assert_eq!(open, [port_of("grpc-push"), port_of("https-webhook")]);
    for selector in [
        &policy["spec"]["podSelector"],
        &object("PodDisruptionBudget", "penstock-control")["spec"]["selector"],
    ] {
        assert_eq!(selector, &deployment["spec"]["selector"]);
    }
}

/// What the standard `restricted` asks of pods, which the namespace enforces.
#[test]
fn control_passes_the_standard_that_its_namespace_enforces() {
    let pod = &object("Deployment", "penstock-control")["spec"]["template"]["spec"];
    let container = &pod["containers"][0]["securityContext"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(container["allowPrivilegeEscalation"], false);
    assert_eq!(container["readOnlyRootFilesystem"], true);
    assert_eq!(container["capabilities"]["drop"][0], "ALL");
    assert!(container["capabilities"]["add"].is_null() && pod["hostNetwork"].is_null());
    let namespace = object("Namespace", "penstock-system");
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted");
}

/// Of every pod, which labels of namespace and pod lead to which entry: exactly one, or none.
#[test]
fn the_webhook_is_asked_for_those_alone_who_asked_for_it() {
    let webhook = object("MutatingWebhookConfiguration", "penstock-injector");
    let hooks = webhook["webhooks"].as_array().unwrap();
    assert!(hooks.iter().all(|hook| hook["failurePolicy"] == "Fail" && hook["sideEffects"] == "None"));
    let matches = |selector: &Value, labels: &[(&str, &str)]| {
        selector["matchExpressions"].as_array().unwrap().iter().all(|expression| {
            let value = labels.iter().find(|(key, _)| expression["key"] == *key).map(|(_, value)| *value);
            let listed = value.is_some_and(|value| {
                expression["values"].as_array().unwrap().iter().any(|one| one.as_str() == Some(value))
            });
            match expression["operator"].as_str().unwrap() {
                "In" => listed,
                "NotIn" => !listed,
                other => panic!("{other}"),
            }
        })
    };
    let asked = |namespace: &str, of_namespace: Option<&str>, of_pod: Option<&str>| -> Vec<&str> {
        let key = "penstock.io/inject";
        let mut labels = vec![("kubernetes.io/metadata.name", namespace)];
        labels.extend(of_namespace.map(|value| (key, value)));
        let own: Vec<_> = of_pod.map(|value| (key, value)).into_iter().collect();
        hooks
            .iter()
            .filter(|hook| {
                matches(&hook["namespaceSelector"], &labels) && matches(&hook["objectSelector"], &own)
            })
            .map(|hook| hook["name"].as_str().unwrap())
            .collect()
    };
    let (on, off) = (Some("enabled"), Some("disabled"));
    // The namespace, its label, the pod's, and who is asked.
    type Row = (&'static str, Option<&'static str>, Option<&'static str>, &'static [&'static str]);
    let table: [Row; 10] = [
        ("a", None, None, &[]),
        ("a", off, None, &[]),
        ("a", on, None, &["namespace.penstock.io"]),
        ("a", on, off, &[]),
        ("a", on, on, &["pod.penstock.io"]),
        ("a", None, on, &["pod.penstock.io"]),
        ("a", off, on, &["pod.penstock.io"]),
        ("kube-system", on, None, &[]),
        ("penstock-system", on, on, &[]),
        ("kube-system", None, on, &[]),
    ];
    for (namespace, of_namespace, of_pod, expected) in table {
        assert_eq!(
            asked(namespace, of_namespace, of_pod),
            expected,
            "{namespace} {of_namespace:?} {of_pod:?}"
        );
    }
}
