//! `InferencePolicy`: what it asks becomes part of its Service's policy.
//!
//! In: the policies in force and the Services. Out: each Service's policy, with what its annotations leave open filled in and
//! its pipelines. Can go wrong: a policy is for nothing, or for what another is for; a setting or a pipeline makes no sense.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::{ServiceName, v1};
use penstock_prepare::{MAX_TENSORS, Pipeline};

use super::annotations;
use super::faults::Faults;
use super::services::Services;
use super::view::View;
use crate::objects::Object;
use crate::objects::inference::{InferencePolicy, Prepare, words};
use crate::outcome::Reason;

/// Joins what policies ask into the Services that they are for.
pub(super) fn join<'a>(view: &View<'a>, services: &mut Services<'a>, faults: &mut Faults) {
    let mut taken: BTreeMap<ServiceName, &Object> = BTreeMap::new();
    for &(object, policy) in &view.inference {
        let target = &policy.spec.target_ref;
        if target.kind != "Service" {
            let message =
                format!("a policy is for a Service, not for {:?}; write `kind: Service`", target.kind);
            faults.refuse(object, "/spec/targetRef/kind", message);
            continue;
        }
        let name = ServiceName::new(&object.id.namespace, &target.name);
        let service = name.ok().and_then(|name| services.get_mut(&name).map(|service| (name, service)));
        let Some((name, service)) = service else {
            let message = format!(
                "there is no Service {} in the namespace {}, so the policy changes nothing; name one, or create it",
                target.name, object.id.namespace
            );
            faults.note_as(Reason::TargetNotFound, object, "/spec/targetRef/name", message);
            continue;
        };
        if let Some(other) = taken.get(&name) {
            let message =
                format!("{name} has the policy {} already, which is in force; join the two", other.id);
            faults.refuse_as(Reason::Conflicted, object, "/spec/targetRef/name", message);
            continue;
        }
        // All of a policy or nothing of it.
        let mut joined = service.policy.clone();
        if settings(object, policy, service.object, &mut joined, faults)
            & pipelines(object, policy, &mut joined, faults)
        {
            service.policy = joined;
            service.inference = Some(&object.id);
        }
        taken.insert(name, object);
    }
}

/// The settings; false: one makes no sense.
fn settings(
    object: &Object,
    policy: &InferencePolicy,
    service: &Object,
    joined: &mut v1::Policy,
    faults: &mut Faults,
) -> bool {
    let mut sound = true;
    for (annotation, read) in annotations::OF_POLICY {
        let name = annotation.strip_prefix("penstock.io/").unwrap_or(annotation);
        let Some(setting) = policy.spec.settings.get(name) else { continue };
        let pointer = format!("/spec/{name}");
        if service.annotation(annotation).is_some() {
            let message = format!(
                "the Service has the annotation {annotation} too, and this wins; remove one of the two"
            );
            faults.note(object, pointer.clone(), message);
        }
        if let Err(error) = words(setting).and_then(|text| read(&text, joined)) {
            faults.refuse(object, pointer, error);
            sound = false;
        }
    }
    sound
}

/// The pipelines; false: one makes no sense.
fn pipelines(
    object: &Object,
    policy: &InferencePolicy,
    joined: &mut v1::Policy,
    faults: &mut Faults,
) -> bool {
    let mut sound = true;
    let mut refuse = |pointer: String, message: String| {
        faults.refuse(object, pointer, message);
        sound = false;
    };
    let (mut seen, mut made) = (BTreeSet::new(), BTreeSet::new());
    for (at, model) in policy.spec.models.iter().enumerate() {
        if model.name.is_empty() {
            refuse(
                format!("/spec/models/{at}/name"),
                "it is empty; write the model's name, or `*` for all".to_owned(),
            );
        }
        for (of, prepare) in model.prepare.iter().enumerate() {
            let pointer = format!("/spec/models/{at}/prepare/{of}");
            let Prepare { input, tensor, shape, pipeline } = prepare;
            if input.is_empty() || !seen.insert((&model.name, input)) {
                let message =
                    format!("the input {input:?} has no name of its own; name each input of a model once");
                refuse(format!("{pointer}/input"), message);
            }
            let tensor = tensor.as_ref().unwrap_or(input);
            let others = policy.spec.models.iter().filter(|other| other.name == model.name);
            let is_input = |other: &Prepare| other.input == *tensor && other.input != *input;
            if tensor.is_empty() {
                refuse(format!("{pointer}/tensor"), "it is empty; write the model's name of it".to_owned());
            } else if others.flat_map(|other| &other.prepare).any(is_input) {
                let message = format!(
                    "{tensor:?} is an input of its own in this policy, so nobody could tell what a client sends by that name; \
                     rename one of the two"
                );
                refuse(format!("{pointer}/tensor"), message);
            } else if !made.insert((&model.name, tensor)) {
                let message = format!(
                    "{tensor:?} is made from another input already, and the model takes it once; name another of its tensors"
                );
                refuse(format!("{pointer}/tensor"), message);
            }
            match Pipeline::new(pipeline) {
                Err(error) => refuse(format!("{pointer}/pipeline"), error.to_string()),
                Ok(made) if made.bytes() > MAX_TENSORS => {
                    let message = format!(
                        "its tensor {:?} has {} bytes, and those of a request have at most {MAX_TENSORS}, so every request \
                         would be refused; make it smaller, or of a smaller dtype",
                        made.shape(),
                        made.bytes()
                    );
                    refuse(format!("{pointer}/pipeline"), message);
                }
                Ok(made) if !shape.is_empty() => {
                    let elements = |dimensions: &[u64]| {
                        dimensions.iter().try_fold(1u64, |all, dimension| all.checked_mul(*dimension))
                    };
                    let own = made.shape().map(|dimension| dimension as u64);
                    if elements(shape) != elements(&own) {
                        let message = format!(
                            "{shape:?} has not as many elements as {own:?}, which the pipeline makes; write dimensions \
                             with the same product, or leave it out"
                        );
                        refuse(format!("{pointer}/shape"), message);
                    }
                }
                Ok(_) => {}
            }
            joined.pipelines.push(v1::Pipeline {
                model: model.name.clone(),
                input: input.clone(),
                tensor: tensor.clone(),
                declaration: serde_json::to_string(pipeline).unwrap_or_default(),
                shape: shape.clone(),
            });
        }
    }
    sound
}
