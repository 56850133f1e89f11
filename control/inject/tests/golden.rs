//! Shapes of pods that people run, and what becomes of each. `UPDATE_GOLDEN=1` writes `*.out.yaml` anew; read the difference.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;

use penstock_inject::{Namespace, Outcome, Settings, inject, pods, uninject};
use serde_json::Value;

fn objects() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| {
            entry.unwrap().path().to_str().unwrap().strip_suffix(".in.yaml").map(str::to_owned)
        })
        .map(|stem| {
            let text = std::fs::read_to_string(format!("{stem}.in.yaml")).unwrap();
            let object = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{stem}: {error}"));
            (stem, object)
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn asking() -> Namespace {
    Namespace { inject: Some("enabled".into()), enforce: None }
}

fn settings() -> Settings {
    Settings { image: "penstock.io/proxy:test".into(), version: "test".into(), ..Settings::default() }
}

fn pod(object: &Value) -> Value {
    let places = pods(object);
    let [place] = &places[..] else { panic!("one pod: {places:?}") };
    object.pointer(&place.pointer).unwrap().clone()
}

#[test]
fn each_shape_becomes_what_is_written() {
    let objects = objects();
    assert!(objects.len() >= 30, "{}", objects.len());
    let mut wrong = Vec::new();
    for (stem, object) in objects {
        let out = match inject(&pod(&object), &asking(), &settings()) {
            Ok(Outcome::Injected(injected)) => {
                let warnings: String =
                    injected.warnings.iter().map(|warning| format!("# warning: {warning}\n")).collect();
                let yaml = serde_saphyr::to_string(&injected.pod).unwrap();
                format!("{warnings}{}\n", yaml.trim_end())
            }
            Ok(Outcome::Not(because)) => format!("# not injected: {because}\n"),
            Err(error) => format!("# error: {error}\n"),
        };
        let path = format!("{stem}.out.yaml");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &out).unwrap();
        } else if std::fs::read_to_string(&path).unwrap_or_default() != out {
            wrong.push(format!("{path} is to be:\n{out}"));
        }
    }
    assert!(wrong.is_empty(), "{}\nUPDATE_GOLDEN=1 writes them", wrong.join("\n"));
}

#[test]
fn the_patch_makes_it_a_second_time_changes_nothing_and_it_can_be_undone() {
    let mut injected_ones = 0;
    for (stem, object) in objects() {
        let before = pod(&object);
        let Ok(Outcome::Injected(injected)) = inject(&before, &asking(), &settings()) else { continue };
        injected_ones += 1;
        let mut patched = before.clone();
        // From its JSON, as an API server would.
        let patch: json_patch::Patch =
            serde_json::from_value(serde_json::to_value(&injected.patch).unwrap()).unwrap();
        json_patch::patch(&mut patched, &patch).unwrap();
        assert_eq!(patched, injected.pod, "{stem}");
        assert!(matches!(inject(&patched, &asking(), &settings()), Ok(Outcome::Not(_))), "{stem}");
        // What another version injected goes back to the pod as it was before either.
        let origin = uninject(&before).unwrap_or(before);
        assert_eq!(uninject(&injected.pod).unwrap(), origin, "{stem}");
    }
    assert!(injected_ones >= 24, "{injected_ones}");
}

#[test]
fn the_sidecar_comes_first_and_nothing_of_the_application_is_touched_but_its_shared_memory() {
    for (stem, object) in objects() {
        let before = pod(&object);
        let Ok(Outcome::Injected(injected)) = inject(&before, &asking(), &settings()) else { continue };
        let origin = uninject(&before).unwrap_or(before);
        let list = |pod: &Value, kind: &str| pod["spec"][kind].as_array().cloned().unwrap_or_default();
        let init = list(&injected.pod, "initContainers");
        assert_eq!(
            (&init[0]["name"], &init[1]["name"]),
            (&"penstock-init".into(), &"penstock-proxy".into()),
            "{stem}"
        );
        assert_eq!(init[2..], list(&origin, "initContainers"), "{stem}");
        for (now, then) in list(&injected.pod, "containers").iter().zip(list(&origin, "containers")) {
            let mut now = now.clone();
            now.as_object_mut().unwrap().remove("volumeMounts");
            let mut then = then.clone();
            then.as_object_mut().unwrap().remove("volumeMounts");
            assert_eq!(now, then, "{stem}");
        }
    }
}
