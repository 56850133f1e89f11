//! The annotations `penstock.io/*`: one table of all of them, and how those of pods are read.
//!
//! [`ALL`] is what docs/OPERATIONS.md is made of, and its examples are held to the readers: those of pods are here ([`pod`]), since the
//! injector and control both read them; those of Services are control's alone, and made of the same [`grammar`].

pub mod grammar;
pub mod pod;
mod ports;

pub use ports::{MOST, Ports, Subnet};

use crate::names::annotation;

/// An annotation whose value makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {name}: {why}")]
pub struct Invalid {
    /// Its name.
    pub name: String,
    /// What of the value is wrong, and what to write.
    pub why: String,
}

/// What carries an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Pods, and namespaces by a label of the same name.
    PodAndNamespace,
    /// Pods, in a Deployment's template for instance.
    Pod,
    /// Pods, and nobody but the injector writes it.
    InjectedPod,
    /// Services.
    Service,
    /// Services, for the pods that they lead to, and pods, which win.
    ServiceAndPod,
    /// Canaries, and a command writes it.
    Canary,
}

impl On {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PodAndNamespace => "pod (and its label); namespace (label)",
            Self::Pod => "pod",
            Self::InjectedPod => "pod, written by the injector",
            Self::Service => "Service",
            Self::ServiceAndPod => "Service; pod, which wins",
            Self::Canary => "Canary, written by `penstock canary`",
        }
    }
}

/// An annotation.
#[derive(Clone, Copy, Debug)]
pub struct Annotation {
    /// Its name.
    pub name: &'static str,
    /// What carries it.
    pub on: On,
    /// How its value is written: `|` is or, `[]` may be left out, `,` stands between parts in any order but that the first word of
    /// `balance` is first.
    pub form: &'static str,
    /// Values that make sense.
    pub examples: &'static [&'static str],
    /// What holds without it, as docs/OPERATIONS.md says it.
    pub without: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

/// All annotations.
pub const ALL: [Annotation; 26] = [
    Annotation {
        name: annotation::INJECT,
        on: On::PodAndNamespace,
        form: "enabled | disabled",
        examples: &["enabled", "disabled"],
        without: "what the namespace says; without that no sidecar",
        meaning: "whether the pod gets a sidecar; the pod wins over its namespace",
    },
    Annotation {
        name: annotation::TRAFFIC_SPLIT,
        on: On::Service,
        form: "<service>=<weight>[,…], weights 0 to 1000000",
        examples: &["resnet-v1=90,resnet-v2=10"],
        without: "the Service's own endpoints",
        meaning: "its requests go to other Services of the namespace, by weight",
    },
    Annotation {
        name: annotation::BALANCE,
        on: On::Service,
        form: "gpu[,choices=2..8][,explore=<share>][,hot=<share>] | prefix[,choices=2..8][,explore=<share>] | least-request | round-robin | ring-hash[,bound=1..100] | orca-wrr",
        examples: &[
            "gpu",
            "gpu,choices=4,explore=2%,hot=90%",
            "prefix,choices=4,explore=2%",
            "least-request",
            "round-robin",
            "ring-hash,bound=1.5",
            "orca-wrr",
        ],
        without: "gpu",
        meaning: "how an endpoint is chosen",
    },
    Annotation {
        name: annotation::STICKY,
        on: On::Service,
        form: "header:<name> | cookie:<name>",
        examples: &["header:x-user", "cookie:session"],
        without: "each request is drawn anew",
        meaning: "one user stays on one version",
    },
    Annotation {
        name: annotation::TIMEOUT,
        on: On::Service,
        form: "[connect=<time>][,request=<time>][,per-try=<time>][,idle=<time>]",
        examples: &["connect=1s,request=30s,per-try=10s,idle=5m"],
        without: "[Policy of a Service](#policy-of-a-service)",
        meaning: "how long what may take",
    },
    Annotation {
        name: annotation::RETRY,
        on: On::Service,
        form: "[attempts=0..10][,on=<status>[+…]][,budget=<percent>%][,buffer=<size>]",
        examples: &["attempts=2,on=503+429,budget=20%,buffer=64Ki"],
        without: "[Policy of a Service](#policy-of-a-service)",
        meaning: "what is tried elsewhere, and how often",
    },
    Annotation {
        name: annotation::OUTLIER,
        on: On::Service,
        form: "[failures=<n>][,base=<time>][,max=<time>][,ejected=<percent>%]",
        examples: &["failures=5,base=1s,max=60s,ejected=50%"],
        without: "[Policy of a Service](#policy-of-a-service)",
        meaning: "when an endpoint that fails is left alone, and for how long",
    },
    Annotation {
        name: annotation::LIMITS,
        on: On::Service,
        form: "[connections=<n>][,pending=<n>][,requests=<n>]",
        examples: &["connections=1024,pending=1024,requests=4096"],
        without: "[Policy of a Service](#policy-of-a-service)",
        meaning: "how much one worker of a client's proxy has open at once",
    },
    Annotation {
        name: annotation::BATCH,
        on: On::Service,
        form: "max=<rows>[,delay=<time>][,bytes=<size>][,elements=<n>][,concurrent=<n>][,target=<time>]",
        examples: &["max=32,delay=2ms", "max=32,bytes=64Mi,elements=65536,concurrent=2,target=50ms"],
        without: "no batches",
        meaning: "requests are executed together (BATCHING.md)",
    },
    Annotation {
        name: annotation::COALESCE,
        on: On::Service,
        form: "[single-flight][,outbound][,cache=<size>/<age>][,shared][,deterministic][,headers=<name>[+…]]",
        examples: &[
            "single-flight,cache=256Mi/30s",
            "single-flight,outbound,shared,deterministic,headers=accept-language+x-tone",
        ],
        without: "nothing is shared",
        meaning: "identical requests are executed once, and answers kept (BATCHING.md)",
    },
    Annotation {
        name: annotation::MTLS,
        on: On::Pod,
        form: "strict | permissive",
        examples: &["strict", "permissive"],
        without: "strict",
        meaning: "whether plaintext is refused or accepted",
    },
    Annotation {
        name: annotation::OPAQUE_PORTS,
        on: On::Pod,
        form: "<port>[,…]",
        examples: &["3306,6379"],
        without: "what the ports declare",
        meaning: "ports whose bytes are not looked at",
    },
    Annotation {
        name: annotation::ADMISSION,
        on: On::ServiceAndPod,
        form: "limit=<n> | limit=adaptive, [,queue=<n>]",
        examples: &["limit=8,queue=256", "limit=adaptive,queue=256"],
        without: "no limit; queue=1024 where a limit is",
        meaning: "how many requests of one model the application gets at once, and how many wait for it",
    },
    Annotation {
        name: annotation::FORWARD_IDENTITY,
        on: On::Pod,
        form: "true | false",
        examples: &["true", "false"],
        without: "false",
        meaning: "the application is told who calls, in `x-forwarded-client-cert`",
    },
    Annotation {
        name: annotation::GPU,
        on: On::Pod,
        form: "ipc[,nvjpeg][,always][,memory=<size>][,device=0..255]",
        examples: &["ipc", "ipc,nvjpeg,always,memory=256Mi,device=0"],
        without: "tensors go through shared memory",
        meaning: "for containers that share a GPU: tensors are handed to the model server in memory of that GPU, where this measures faster; \
                  `nvjpeg` has JPEGs decoded by that library on the GPU, to pixels that differ a little from the CPU's",
    },
    Annotation {
        name: annotation::TENANT_REGIONS,
        on: On::Pod,
        form: "1..64",
        examples: &["4"],
        without: "callers share one",
        meaning: "so many callers at most get a region of shared memory of their own, and share no execution with others",
    },
    Annotation {
        name: annotation::INBOUND_PORT,
        on: On::Pod,
        form: "<port>",
        examples: &["15006"],
        without: "traffic is redirected",
        meaning: "where traffic is not redirected: the port its proxy listens on for the mesh",
    },
    Annotation {
        name: annotation::SKIP_INBOUND_PORTS,
        on: On::Pod,
        form: "<port>|<first>-<last>[,…], 256 ranges at most",
        examples: &["9090,7000-7100"],
        without: "all ports are redirected",
        meaning: "ports of its application that are reached past the proxy; `penstock-proxy init --skip-inbound-ports`",
    },
    Annotation {
        name: annotation::SKIP_OUTBOUND_PORTS,
        on: On::Pod,
        form: "<port>|<first>-<last>[,…], 256 ranges at most",
        examples: &["25,587"],
        without: "all ports are redirected",
        meaning: "ports that its application reaches past the proxy; `penstock-proxy init --skip-outbound-ports`",
    },
    Annotation {
        name: annotation::SKIP_SUBNETS,
        on: On::Pod,
        form: "<address>[/<bits>][,…]",
        examples: &["169.254.0.0/16,fd00::/8"],
        without: "all addresses are redirected",
        meaning: "subnets that its application reaches past the proxy; `penstock-proxy init --skip-subnets`",
    },
    Annotation {
        name: annotation::PROXY_CPU,
        on: On::Pod,
        form: "<quantity>",
        examples: &["250m", "1"],
        without: "100m",
        meaning: "the CPU that its injected proxy asks for, without a limit",
    },
    Annotation {
        name: annotation::PROXY_MEMORY,
        on: On::Pod,
        form: "<quantity>",
        examples: &["512Mi"],
        without: "128Mi, limited to 1Gi",
        meaning: "the memory that its injected proxy asks for and is limited to; at 85 % of it new requests are refused (`out-of-memory`)",
    },
    Annotation {
        name: annotation::INJECTED_BY,
        on: On::InjectedPod,
        form: "<version>",
        examples: &["0.1.0"],
        without: "not injected",
        meaning: "the version that injected it",
    },
    Annotation {
        name: annotation::INJECTED_CHANGES,
        on: On::InjectedPod,
        form: "<change>[,…]",
        examples: &[],
        without: "not injected",
        meaning: "what `penstock uninject` has to undo besides what it finds by name",
    },
    Annotation {
        name: annotation::PROMOTE,
        on: On::Canary,
        form: "<run>/<anything>",
        examples: &[],
        without: "a step that waits for a person waits",
        meaning: "the step that it is at has been held long enough; each text is heard once",
    },
    Annotation {
        name: annotation::ABORT,
        on: On::Canary,
        form: "<run>/<anything>",
        examples: &[],
        without: "it goes back when analysis fails",
        meaning: "it goes back now; each text is heard once",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_in_the_table_once() {
        let source = include_str!("../names.rs");
        let module = source.split_once("pub mod annotation {\n").unwrap().1.split_once("\n}").unwrap().0;
        let mut named: Vec<_> = module
            .lines()
            .filter_map(|line| line.trim().strip_prefix("pub const ")?.split('"').nth(1))
            .collect();
        let mut told: Vec<_> = ALL.iter().map(|one| one.name).collect();
        named.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, named);
    }

    #[test]
    fn examples_on_pods_are_read_and_only_those_of_pods() {
        for one in &ALL {
            let by_hand = matches!(one.on, On::PodAndNamespace | On::Pod | On::ServiceAndPod);
            for example in one.examples {
                assert_eq!(
                    pod::check(one.name, example),
                    by_hand.then_some(Ok(())),
                    "{} {example}",
                    one.name
                );
            }
            assert!(!by_hand || !one.examples.is_empty(), "{} has no example", one.name);
        }
        let admission = ALL.iter().find(|one| one.name == annotation::ADMISSION).unwrap();
        assert!(admission.without.contains(&format!("queue={}", pod::QUEUE)));
    }
}
