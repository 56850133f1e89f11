//! Whatever the injector writes into a pod, this command line takes: each golden pod of `penstock inject`, and the pod that is written by hand,
//! is started here as far as its options go.

use std::path::{Path, PathBuf};

use clap::{CommandFactory as _, Parser as _};
use penstock_api::annotation::pod as annotations;
use penstock_api::names::port;
use serde_json::Value;

use crate::{Cli, Command, Run, complete, let_pass};

fn pods() -> Vec<(PathBuf, Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let golden = std::fs::read_dir(root.join("control/inject/tests/golden")).unwrap();
    let golden = golden.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = golden.filter(|path| path.to_string_lossy().ends_with(".out.yaml")).collect();
    files.push(root.join("manifests/examples/sidecar/pod.yaml"));
    files.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let documents = text.split("\n---\n").map(|text| serde_saphyr::from_str::<Value>(text).unwrap());
        documents
            .filter(|one| one["kind"] == "Pod" || one["spec"].is_object())
            .map(move |one| (path.clone(), one))
            .collect::<Vec<_>>()
    };
    files.into_iter().flat_map(read).collect()
}

fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    pod["spec"]["initContainers"].as_array()?.iter().find(|one| one["name"] == name)
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// Its command line; variables that options are read from stand as those options, since a test changes no environment.
fn line(container: &Value) -> Vec<String> {
    let mut line = [texts(&container["command"]), texts(&container["args"])].concat();
    let command = Cli::command();
    let of = command.find_subcommand(&line[1]).unwrap_or_else(|| panic!("no command {}", line[1]));
    for variable in container["env"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().unwrap();
        let option = of.get_arguments().find(|option| option.get_env().is_some_and(|known| known == name));
        match option {
            Some(option) => {
                let value = variable["value"].as_str().unwrap();
                line.push(format!("--{}={value}", option.get_long().unwrap()));
            }
            None => assert!(!name.starts_with("PENSTOCK_"), "no option is read from {name}"),
        }
    }
    line
}

fn parsed(place: &Path, container: &Value) -> Command {
    let line = line(container);
    Cli::try_parse_from(&line)
        .unwrap_or_else(|error| panic!("{}: {line:?}: {error}", place.display()))
        .command
}

fn run(place: &Path, container: &Value) -> Box<Run> {
    match parsed(place, container) {
        Command::Run(run) => run,
        Command::Init(_) | Command::Drain(_) => panic!("{}: no run", place.display()),
    }
}

#[test]
fn every_injected_sidecar_is_started_with_options_that_there_are() {
    let mut seen = 0;
    for (place, pod) in pods() {
        let Some(proxy) = container(&pod, "penstock-proxy") else { continue };
        // By hand, or another version's: whoever wrote it wrote it.
        if !proxy["command"].is_array() {
            continue;
        }
        seen += 1;
        let options = run(&place, proxy);
        assert_eq!(complete(&options), Ok(()), "{}", place.display());
        let user = u32::try_from(proxy["securityContext"]["runAsUser"].as_u64().unwrap()).unwrap();
        assert_eq!(let_pass(&options, user), Ok(()), "{}", place.display());
        for probe in ["startupProbe", "readinessProbe"] {
            let asked = proxy[probe]["httpGet"]["port"].as_u64().unwrap_or(port::HEALTH.into());
            assert_eq!(asked, u64::from(options.health.port()), "{}: {probe}", place.display());
        }
        assert!(options.health.ip().is_unspecified(), "{}: the kubelet cannot ask", place.display());
        let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64();
        assert!(
            grace.is_none_or(|grace| grace == 0 || grace > options.drain_timeout.as_secs()),
            "{}: killed while it drains",
            place.display()
        );
        let hook = texts(&proxy["lifecycle"]["preStop"]["exec"]["command"]);
        let hook = Cli::try_parse_from(&hook).unwrap_or_else(|error| panic!("{hook:?}: {error}")).command;
        assert!(matches!(hook, Command::Drain(_)), "{}", place.display());
    }
    assert!(seen >= 25, "{seen}");
}

#[test]
fn the_rules_of_every_injected_pod_are_what_its_annotations_say() {
    let (mut seen, mut skipping) = (0, 0);
    for (place, pod) in pods() {
        let Some(container) = container(&pod, "penstock-init") else { continue };
        if !container["command"].is_array() {
            continue;
        }
        seen += 1;
        let Command::Init(init) = parsed(&place, container) else { panic!("{}: no init", place.display()) };
        let options = init.options();
        assert_eq!(options.sound(), Ok(()));
        let said = |name: &str| pod["metadata"]["annotations"][name].as_str().map(str::to_owned);
        let ports = |key: annotations::Key<_>| {
            said(key.name).map(|text| key.read(&text).unwrap()).unwrap_or_default()
        };
        assert_eq!(options.skip_inbound, ports(annotations::SKIP_INBOUND_PORTS), "{}", place.display());
        assert_eq!(options.skip_outbound, ports(annotations::SKIP_OUTBOUND_PORTS), "{}", place.display());
        let subnets =
            said(annotations::SKIP_SUBNETS.name).map(|text| annotations::SKIP_SUBNETS.read(&text).unwrap());
        assert_eq!(options.skip_subnets, subnets.unwrap_or_default(), "{}", place.display());
        skipping += usize::from(!container["args"].is_null());
    }
    assert!(seen >= 25 && skipping > 0, "{seen}, {skipping} of them with options");
}
