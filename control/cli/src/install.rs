//! `penstock install` and `penstock uninstall`: what a cluster needs, for `kubectl apply -f -`, and what to take away again.
//!
//! The text is that of `manifests/install`, the base for kustomize, with its comments: by default it is the same word for word. Options
//! replace lines that are known to be there. Nothing is changed in the cluster here; uninstalling looks at it, to say whose sidecars
//! remain. Can go wrong: a value that no object could have.

use penstock_api::SpiffeId;
use penstock_api::names::DEFAULT_TRUST_DOMAIN;

use crate::cluster::{Answer, Cluster, name, namespace};
use crate::failure::{Failure, exit};
use crate::output::Output;

/// Where control runs.
pub(crate) use penstock_api::names::SYSTEM_NAMESPACE as NAMESPACE;
/// Brings all objects to what this program installs.
pub(crate) const APPLY: &str = "penstock install | kubectl apply -f -";
/// Brings the definitions alone.
pub(crate) const APPLY_CRDS: &str = "penstock install --crds-only | kubectl apply -f -";
/// Where images come from unless said.
const IMAGES: &str = "penstock.io";
/// Replicas of control unless said.
const REPLICAS: u32 = 2;

const NAMESPACES: &str = include_str!("../../../manifests/install/namespace.yaml");
const CRDS: [&str; 4] = [
    include_str!("../../../manifests/install/crd-accesspolicies.yaml"),
    include_str!("../../../manifests/install/crd-canaries.yaml"),
    include_str!("../../../manifests/install/crd-inferencepolicies.yaml"),
    include_str!("../../../manifests/install/crd-ratelimits.yaml"),
];
const RBAC: &str = include_str!("../../../manifests/install/rbac.yaml");
const SERVICES: &str = include_str!("../../../manifests/install/services.yaml");
const CONTROL: &str = include_str!("../../../manifests/install/control.yaml");
const WEBHOOK: &str = include_str!("../../../manifests/install/webhook.yaml");

/// The arguments of `install`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the custom resource definitions alone, which are applied first on upgrades
    #[arg(long)]
    crds_only: bool,
    /// Where images come from: PREFIX/control and PREFIX/proxy; penstock.io unless said
    #[arg(long, value_name = "PREFIX", hide_default_value = true, default_value = IMAGES)]
    image_prefix: String,
    /// The version of the images; this program's own unless said
    #[arg(long, value_name = "TAG", hide_default_value = true, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Replicas of control; 2 unless said
    #[arg(long, value_name = "N", hide_default_value = true, default_value_t = REPLICAS, value_parser = clap::value_parser!(u32).range(1..=50))]
    replicas: u32,
    /// The trust domain of all identities, once and for all; cluster.local unless said
    #[arg(long, value_name = "DOMAIN", hide_default_value = true, default_value = DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
}

/// The arguments of `uninstall`.
#[derive(Debug, clap::Args)]
pub(crate) struct Removal {
    /// Print the custom resource definitions too: with them go all policies that anybody has written
    #[arg(long)]
    crds: bool,
    /// The context of the kubeconfig; its current one unless said
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            crds_only: false,
            image_prefix: IMAGES.to_owned(),
            tag: env!("CARGO_PKG_VERSION").to_owned(),
            replicas: REPLICAS,
            trust_domain: DEFAULT_TRUST_DOMAIN.to_owned(),
        }
    }
}

/// Runs `install`.
pub(crate) fn run(args: &Args, output: Output) -> Result<u8, Failure> {
    output.text(&manifest(args)?)?;
    Ok(exit::FINE)
}

/// The whole text.
pub(crate) fn manifest(args: &Args) -> Result<String, Failure> {
    if args.crds_only {
        return Ok(CRDS.join("---\n"));
    }
    let wrong = |option: &str, value: &str, fix: &str| {
        Failure::Usage(format!("--{option} {value:?} makes no sense; {fix}"))
    };
    let plain = |text: &str, more: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    if !plain(&args.image_prefix, "./:_-") || args.image_prefix.ends_with('/') {
        let fix = "write a registry and what is in front of /control, such as registry.example.com/penstock";
        return Err(wrong("image-prefix", &args.image_prefix, fix));
    }
    if !plain(&args.tag, "._-") || args.tag.len() > 128 || args.tag.starts_with(['.', '-']) {
        return Err(wrong("tag", &args.tag, "write the tag of an image, such as 0.1.0"));
    }
    if SpiffeId::new(&args.trust_domain, NAMESPACE, "penstock-control").is_err() {
        return Err(wrong(
            "trust-domain",
            &args.trust_domain,
            "write a DNS name in lower case, such as cluster.local",
        ));
    }
    let plain = Args::default();
    let image = |args: &Args, of: &str| format!("{}/{of}:{}", args.image_prefix, args.tag);
    let control = [
        (image(&plain, "control"), image(args, "control")),
        (image(&plain, "proxy"), image(args, "proxy")),
        (format!("replicas: {REPLICAS}\n"), format!("replicas: {}\n", args.replicas)),
        (
            format!("--trust-domain={DEFAULT_TRUST_DOMAIN}\n"),
            format!("--trust-domain={}\n", args.trust_domain),
        ),
    ]
    .iter()
    .fold(CONTROL.to_owned(), |text, (from, to)| text.replace(from, to));
    let mut parts = vec![NAMESPACES];
    parts.extend(CRDS);
    parts.extend([RBAC, SERVICES, &control, WEBHOOK]);
    Ok(parts.join("---\n"))
}

/// What is deleted, first what would be in the way: no pod waits for a webhook that is gone, and nobody's rights go before who uses them.
fn removal(crds: bool, anchors: &[(String, String)]) -> String {
    let mut parts: Vec<String> = [WEBHOOK, CONTROL, SERVICES, RBAC].map(str::to_owned).into();
    parts.extend(anchors.iter().map(|(namespace, name)| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\n")
    }));
    if crds {
        parts.extend(CRDS.map(str::to_owned));
    }
    parts.push(NAMESPACES.to_owned());
    parts.join("---\n")
}

/// Runs `uninstall`: the objects to standard output, what to know to standard error.
pub(crate) async fn remove(args: &Removal, output: Output) -> Result<u8, Failure> {
    let (anchors, told) = match Cluster::open(args.context.as_deref()).await {
        Ok(cluster) => {
            let anchors =
                cluster.list("/api/v1/configmaps?fieldSelector=metadata.name%3Dpenstock-anchors").await;
            let pods = cluster.list("/api/v1/pods?labelSelector=penstock.io%2Finjected%3Dtrue").await;
            let found = anchors.items().iter().map(|map| (namespace(map).to_owned(), name(map).to_owned()));
            (found.filter(|(namespace, _)| namespace != NAMESPACE).collect(), remaining(&pods))
        }
        Err(why) => (
            Vec::new(),
            format!(
                "{why:#}. So whose sidecars remain is not known, nor where ConfigMaps penstock-anchors are."
            ),
        ),
    };
    eprintln!("{told}");
    output.text(&removal(args.crds, &anchors))?;
    Ok(exit::FINE)
}

/// Whose sidecars remain, and what becomes of them.
fn remaining(pods: &Answer) -> String {
    let Answer::Found(_) = pods else {
        return format!("Whose sidecars remain is not known: {}.", pods.trouble());
    };
    let pods = pods.items();
    if pods.is_empty() {
        return "No pod has a sidecar any more.".to_owned();
    }
    let mut text = format!(
        "{} still with a sidecar. Their sidecars go on with what they have until their certificates end, within hours; after that they \
         reach nobody. Take the label penstock.io/inject from their namespaces, start them anew once the webhook is gone, and delete the \
         rest last:\n",
        if pods.len() == 1 { "1 pod is".to_owned() } else { format!("{} pods are", pods.len()) }
    );
    for pod in pods.iter().take(20) {
        text.push_str(&format!("  {}/{}\n", namespace(pod), name(pod)));
    }
    if pods.len() > 20 {
        text.push_str(&format!(
            "  and {} more: kubectl get pods -A -l penstock.io/injected=true\n",
            pods.len() - 20
        ));
    }
    text.push_str("  kubectl -n NAMESPACE rollout restart deployment,statefulset,daemonset");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn documents(text: &str) -> Vec<Value> {
        text.split("---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
    }

    fn kinds(text: &str) -> Vec<String> {
        documents(text).iter().map(|object| object["kind"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn what_is_referred_to_comes_first() {
        let kinds = kinds(&manifest(&Args::default()).unwrap());
        assert_eq!(kinds.len(), 17, "{kinds:?}");
        let at = |kind: &str| kinds.iter().position(|known| known == kind).unwrap();
        assert_eq!(at("Namespace"), 0);
        assert!(at("CustomResourceDefinition") < at("ClusterRole"));
        assert!(
            at("ServiceAccount") < at("Deployment") && at("Deployment") < at("MutatingWebhookConfiguration")
        );
    }

    #[test]
    fn each_option_changes_what_it_names_and_nothing_else() {
        let args = Args {
            image_prefix: "registry.example.com:5000/mesh".to_owned(),
            tag: "1.2.3".to_owned(),
            replicas: 3,
            trust_domain: "example.org".to_owned(),
            ..Args::default()
        };
        let (before, after) = (manifest(&Args::default()).unwrap(), manifest(&args).unwrap());
        let changed: Vec<_> =
            before.lines().zip(after.lines()).filter(|(a, b)| a != b).map(|(_, line)| line.trim()).collect();
        assert_eq!(
            changed,
            [
                "replicas: 3",
                "image: registry.example.com:5000/mesh/control:1.2.3",
                "- --trust-domain=example.org",
                "- --proxy-image=registry.example.com:5000/mesh/proxy:1.2.3",
            ]
        );
        assert_eq!(before.lines().count(), after.lines().count());
    }

    #[test]
    fn values_that_no_object_could_have_are_refused() {
        let default = Args::default;
        for args in [
            Args { image_prefix: "a b".to_owned(), ..default() },
            Args { image_prefix: "a/".to_owned(), ..default() },
            Args { tag: "1.0\n- --x".to_owned(), ..default() },
            Args { tag: String::new(), ..default() },
            Args { trust_domain: "Example.org".to_owned(), ..default() },
        ] {
            assert!(matches!(manifest(&args), Err(Failure::Usage(_))), "{args:?}");
        }
    }

    #[test]
    fn definitions_alone_are_the_definitions() {
        let text = manifest(&Args { crds_only: true, ..Args::default() }).unwrap();
        assert_eq!(kinds(&text), ["CustomResourceDefinition"; 4]);
    }

    #[test]
    fn the_webhook_goes_first_and_policies_stay_unless_asked_for() {
        let text = removal(false, &[("team-a".to_owned(), "penstock-anchors".to_owned())]);
        let kinds_kept = kinds(&text);
        assert_eq!(kinds_kept[0], "MutatingWebhookConfiguration");
        assert_eq!(kinds_kept.last().unwrap(), "ResourceQuota");
        assert!(kinds_kept.contains(&"ConfigMap".to_owned()));
        assert!(!kinds_kept.contains(&"CustomResourceDefinition".to_owned()));
        // All that is installed goes.
        let (mut gone, mut made) = (kinds(&removal(true, &[])), kinds(&manifest(&Args::default()).unwrap()));
        gone.sort();
        made.sort();
        assert_eq!(gone, made);
    }

    #[test]
    fn who_uninstalls_is_told_whose_sidecars_remain() {
        let pod = |name: &str| json!({"metadata": {"name": name, "namespace": "team-a"}});
        assert!(remaining(&Answer::Found(json!({"items": []}))).contains("No pod"));
        let told = remaining(&Answer::Found(json!({"items": [pod("a"), pod("b")]})));
        assert!(
            told.starts_with("2 pods are still")
                && told.contains("team-a/b")
                && told.contains("rollout restart")
        );
        let many: Vec<_> = (0..25).map(|i| pod(&i.to_string())).collect();
        assert!(remaining(&Answer::Found(json!({"items": many}))).contains("and 5 more"));
        assert!(remaining(&Answer::Denied("you may not".to_owned())).contains("not known"));
    }
}
