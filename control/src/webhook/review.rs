//! An AdmissionReview, read and answered. Pure: no connection, no clock.
//!
//! In: the body that an API server sends. Out: the body that it is answered with. The pod stays JSON, so that the patch is
//! made for exactly the pod that the API server has, with fields that this build does not know.

use base64::Engine as _;
use penstock_inject::{Because, Error, Injected, Namespace, Outcome, Settings};
use serde_json::{Value, json};

/// The only version of reviews that is spoken; `admissionReviewVersions` of the webhook says so.
const VERSION: &str = "admission.k8s.io/v1";

/// What is asked.
#[derive(Debug)]
pub(super) struct Question {
    /// What the answer has to repeat.
    pub(super) uid: String,
    /// Where the object is to be.
    pub(super) namespace: String,
    /// What it is called, for people: `web-0`, `web-…` where the name is yet to be made up.
    pub(super) name: String,
    /// The object, if it is a pod that is being made.
    pub(super) pod: Option<Value>,
    /// What it is instead, in words.
    pub(super) other: String,
}

/// How a review ends.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// The pod gets a sidecar.
    Injected {
        /// RFC 6902.
        patch: Vec<u8>,
        /// For the pod's author.
        warnings: Vec<String>,
    },
    /// It has a sidecar, and gets the gate of its Canary.
    Gated {
        /// RFC 6902.
        patch: Vec<u8>,
    },
    /// It stays as it is.
    Unchanged {
        /// For the author of whatever it is.
        warnings: Vec<String>,
    },
    /// It is not made.
    Refused(Refusal),
}

/// Why a pod is not made.
#[derive(Debug, PartialEq)]
pub(super) struct Refusal {
    /// The HTTP status that whoever makes the pod sees.
    pub(super) code: u16,
    /// Kubernetes' own word for it.
    pub(super) reason: &'static str,
    /// What is wrong and what to do.
    pub(super) message: String,
}

impl Verdict {
    /// As it is counted.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Injected { .. } => "injected",
            Self::Gated { .. } => "gated",
            Self::Unchanged { .. } => "unchanged",
            Self::Refused(Refusal { code: 500.., .. }) => "failed",
            Self::Refused(_) => "refused",
        }
    }
}

/// Reads a review.
pub(super) fn read(body: &[u8]) -> Result<Question, String> {
    let mut review: Value =
        serde_json::from_slice(body).map_err(|error| format!("the body is no JSON: {error}"))?;
    let text = |review: &Value, pointer: &str| {
        review.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let (version, kind) = (text(&review, "/apiVersion"), text(&review, "/kind"));
    if (&*version, &*kind) != (VERSION, "AdmissionReview") {
        return Err(format!(
            "the body is {version:?} {kind:?} and no AdmissionReview of {VERSION}; set admissionReviewVersions: [v1]"
        ));
    }
    let uid = text(&review, "/request/uid");
    if uid.is_empty() {
        return Err("the review has no request with a uid".to_owned());
    }
    let operation = text(&review, "/request/operation");
    let (group, kind) = (text(&review, "/request/kind/group"), text(&review, "/request/kind/kind"));
    let part = text(&review, "/request/subResource");
    let object = review.pointer_mut("/request/object").map(Value::take).unwrap_or_default();
    let name = match (text(&object, "/metadata/name"), text(&object, "/metadata/generateName")) {
        (name, _) if !name.is_empty() => name,
        (_, prefix) if !prefix.is_empty() => prefix + "…",
        _ => text(&review, "/request/name"),
    };
    let ours = (&*group, &*kind, &*part, &*operation) == ("", "Pod", "", "CREATE");
    let slash = if part.is_empty() { "" } else { "/" };
    Ok(Question {
        uid,
        namespace: text(&review, "/request/namespace"),
        name,
        pod: ours.then_some(object),
        other: format!("{operation} of {kind}{slash}{part}"),
    })
}

/// What injection makes of a pod.
pub(super) type Made = Result<Outcome, Error>;

/// Whether an outcome rests on what the namespace says, so that it has to be its newest word: else a pod that is made right
/// after its namespace was labelled would start without a sidecar.
pub(super) fn rests_on_namespace(made: &Made) -> bool {
    matches!(
        made,
        Ok(Outcome::Not(Because::NotAsked | Because::NamespaceDisabled)) | Err(Error::PodSecurity(_))
    )
}

/// Injects a pod.
pub(super) fn make(pod: &Value, namespace: &Namespace, settings: &Settings) -> Made {
    penstock_inject::inject(pod, namespace, settings)
}

/// What an outcome means for the pod. Who asked for a sidecar and cannot have one is refused: it would speak plaintext.
///
/// `gate`: steps that give a pod of the mesh the gate of its Canary.
pub(super) fn verdict(question: &Question, made: Made, gate: Vec<Value>) -> Verdict {
    let refused = |code, reason, why: &dyn std::fmt::Display| {
        let Question { namespace, name, .. } = question;
        let message = format!("pod {namespace}/{name} cannot have a sidecar: {why}");
        Verdict::Refused(Refusal { code, reason, message })
    };
    match made {
        Ok(Outcome::Injected(Injected { patch, warnings, .. })) => {
            let steps = serde_json::to_value(&patch).and_then(serde_json::from_value::<Vec<Value>>);
            let patch = steps.and_then(|steps| serde_json::to_vec(&[steps, gate].concat()));
            match patch {
                Ok(patch) => Verdict::Injected { patch, warnings },
                Err(error) => refused(500, "InternalError", &error),
            }
        }
        Ok(Outcome::Not(Because::ByHand | Because::Already)) if !gate.is_empty() => {
            Verdict::Gated { patch: Value::from(gate).to_string().into_bytes() }
        }
        Ok(Outcome::Not(because)) => match because {
            Because::HostNetwork | Because::Windows => refused(403, "Forbidden", &because),
            Because::ByHand => Verdict::Unchanged { warnings: vec![format!("no sidecar added: {because}")] },
            Because::NotAsked | Because::Disabled | Because::NamespaceDisabled | Because::Already => {
                Verdict::Unchanged { warnings: Vec::new() }
            }
        },
        Err(error @ Error::PodSecurity(_)) => refused(403, "Forbidden", &error),
        Err(error) => refused(422, "Invalid", &error),
    }
}

/// What is said of anything but a pod that is being made: nothing is refused that nobody asked a sidecar for.
pub(super) fn not_ours(question: &Question) -> Verdict {
    let warning = format!(
        "penstock injects pods when they are made, and was asked about {}; correct the rules of its webhook",
        question.other
    );
    Verdict::Unchanged { warnings: vec![warning] }
}

/// The review that answers.
pub(super) fn answer(uid: &str, verdict: &Verdict) -> Value {
    let mut response = json!({"uid": uid, "allowed": true});
    let patch = match verdict {
        Verdict::Injected { patch, .. } | Verdict::Gated { patch } => Some(patch),
        Verdict::Unchanged { .. } | Verdict::Refused(_) => None,
    };
    if let Some(patch) = patch {
        response["patchType"] = "JSONPatch".into();
        response["patch"] = base64::engine::general_purpose::STANDARD.encode(patch).into();
    }
    let warned = match verdict {
        Verdict::Injected { warnings, .. } => &warnings[..],
        Verdict::Gated { .. } => &[],
        Verdict::Unchanged { warnings } => warnings,
        Verdict::Refused(Refusal { code, reason, message }) => {
            response["allowed"] = false.into();
            response["status"] = json!({"code": code, "reason": reason, "message": message});
            &[]
        }
    };
    if !warned.is_empty() {
        response["warnings"] = json!(warned);
    }
    json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut review = json!({
            "apiVersion": VERSION, "kind": "AdmissionReview",
            "request": {
                "uid": "7", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE",
                "namespace": "team-a", "object": {
                    "metadata": {"generateName": "web-"}, "spec": {"containers": [{"name": "web"}]},
                },
            },
        });
        change(&mut review);
        serde_json::to_vec(&review).unwrap()
    }

    fn asking() -> Namespace {
        Namespace { inject: Some("enabled".into()), enforce: None }
    }

    fn judge(body: &[u8], namespace: &Namespace) -> Verdict {
        let question = read(body).unwrap();
        let made = make(question.pod.as_ref().unwrap(), namespace, &Settings::default());
        verdict(&question, made, Vec::new())
    }

    #[test]
    fn an_answer_repeats_the_uid_and_has_the_patch() {
        let body = review(|_| {});
        let verdict = judge(&body, &asking());
        let answer = answer(&read(&body).unwrap().uid, &verdict);
        assert_eq!((&answer["response"]["uid"], &answer["response"]["allowed"]), (&json!("7"), &json!(true)));
        assert_eq!(answer["response"]["patchType"], "JSONPatch");
        let text = answer["response"]["patch"].as_str().unwrap();
        let patch = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        let patch: Value = serde_json::from_slice(&patch).unwrap();
        assert!(
            patch.as_array().unwrap().iter().any(|step| step["path"] == "/spec/initContainers"),
            "{patch}"
        );
        assert!(answer["response"].get("status").is_none() && answer["response"].get("warnings").is_none());
    }

    #[test]
    fn who_asked_and_cannot_have_one_is_refused_with_what_to_do() {
        let table: [(&str, Value, u16, &str); 5] = [
            ("/request/object/spec/hostNetwork", json!(true), 403, "it has hostNetwork"),
            ("/request/object/spec/os", json!({"name": "windows"}), 403, "Windows"),
            (
                "/request/object/metadata/annotations",
                json!({"penstock.io/mtls": "maybe"}),
                422,
                "write permissive or strict",
            ),
            ("/request/object/spec/containers", json!([]), 422, "there is no container"),
            ("/request/object", json!(["a pod?"]), 422, "a pod is a mapping"),
        ];
        for (pointer, value, code, words) in table {
            let body = review(|review| {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                review.pointer_mut(parent).unwrap()[key] = value;
            });
            let Verdict::Refused(refusal) = judge(&body, &asking()) else { panic!("{pointer}") };
            assert!(refusal.code == code && refusal.message.contains(words), "{refusal:?}");
            let answer = answer("7", &Verdict::Refused(refusal));
            assert_eq!(answer["response"]["allowed"], false);
        }
        let restricted = Namespace { enforce: Some("restricted".into()), ..asking() };
        let Verdict::Refused(refusal) = judge(&review(|_| {}), &restricted) else { panic!() };
        assert!(refusal.message.contains("pod team-a/web-… cannot have a sidecar: the namespace enforces"));
    }

    #[test]
    fn nothing_else_is_touched() {
        assert_eq!(
            judge(&review(|_| {}), &Namespace::default()),
            Verdict::Unchanged { warnings: Vec::new() }
        );
        for change in [
            (|review: &mut Value| review["request"]["operation"] = "UPDATE".into()) as fn(&mut Value),
            |review| review["request"]["kind"]["kind"] = "Deployment".into(),
            |review| review["request"]["subResource"] = "ephemeralcontainers".into(),
        ] {
            let question = read(&review(change)).unwrap();
            assert!(question.pod.is_none());
            let Verdict::Unchanged { warnings } = not_ours(&question) else { panic!() };
            assert!(warnings[0].contains(&question.other), "{warnings:?}");
        }
    }

    #[test]
    fn what_is_no_review_is_told_so() {
        let deep = "[".repeat(100_000);
        let table: [(&[u8], &str); 6] = [
            (b"", "no JSON"),
            (b"{", "no JSON"),
            (deep.as_bytes(), "no JSON"),
            (b"null", "no AdmissionReview"),
            (
                br#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}"#,
                "admissionReviewVersions",
            ),
            (
                br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":7}}"#,
                "no request",
            ),
        ];
        for (body, words) in table {
            let told = read(body).unwrap_err();
            assert!(told.contains(words), "{told}");
        }
    }

    #[test]
    fn only_what_the_namespace_decides_is_asked_for_again() {
        let made = |pod: Value, namespace: &Namespace| make(&pod, namespace, &Settings::default());
        let pod = json!({"spec": {"containers": [{"name": "web"}]}});
        assert!(rests_on_namespace(&made(pod.clone(), &Namespace::default())));
        let no = Namespace { inject: Some("disabled".into()), enforce: None };
        assert!(rests_on_namespace(&made(pod.clone(), &no)));
        let restricted = Namespace { enforce: Some("baseline".into()), ..asking() };
        assert!(rests_on_namespace(&made(pod.clone(), &restricted)));
        assert!(!rests_on_namespace(&made(pod, &asking())));
        assert!(!rests_on_namespace(&made(
            json!({"metadata": {"labels": {"penstock.io/inject": "disabled"}}}),
            &asking()
        )));
    }
}
