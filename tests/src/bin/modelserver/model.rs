//! Models: found in the repository, loaded with tract, asked with checked requests.

use crate::refusal::Refusal;
use crate::stats::Stats;
use anyhow::{Context as _, bail, ensure};
use penstock_inference::oip::{self, Datatype, InferRequest, ModelMetadata, Parameters, TensorMetadata};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tract_onnx::prelude::*;

/// Every loaded model, by name and by the number of its version.
pub(crate) struct Repository {
    models: BTreeMap<String, BTreeMap<u64, Arc<Model>>>,
}

/// Which model.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// A model that is ready to run.
pub(crate) struct Model {
    pub(crate) identity: Identity,
    pub(crate) inputs: Vec<TensorMetadata>,
    pub(crate) outputs: Vec<TensorMetadata>,
    pub(crate) stats: Stats,
    max_batch: u64,
    plan: Arc<TypedRunnableModel>,
}

impl Repository {
    /// Loads `NAME/VERSION/model.onnx` for each that `only` lets through; all, if it is empty.
    pub(crate) fn load(dir: &Path, only: &[String], max_batch: u64) -> anyhow::Result<Self> {
        let mut models: BTreeMap<String, BTreeMap<u64, Arc<Model>>> = BTreeMap::new();
        let mut asked: Vec<_> = only.iter().map(|text| (text, false)).collect();
        for name in directories(dir)? {
            for version in directories(&dir.join(&name))? {
                let file = dir.join(&name).join(&version).join("model.onnx");
                let full = format!("{name}:{version}");
                let wanted = asked.iter_mut().filter(|(text, _)| **text == name || **text == full);
                let chosen = wanted.map(|(_, found)| *found = true).count() > 0;
                if !file.is_file() || !(chosen || only.is_empty()) {
                    continue;
                }
                let number = version
                    .parse()
                    .with_context(|| format!("{}: the version is not a number", file.display()))?;
                // Names become metric labels and parts of paths.
                ensure!(
                    name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)),
                    "{}: a model's name has letters, digits and -_. only",
                    file.display()
                );
                let identity = Identity { name: name.clone(), version };
                let model = Model::load(&file, identity, max_batch)
                    .with_context(|| format!("cannot load {}", file.display()))?;
                let list = |tensors: &[TensorMetadata]| {
                    tensors.iter().map(TensorMetadata::to_string).collect::<Vec<_>>().join(", ")
                };
                tracing::info!(
                    "loaded {full}: takes {}, gives {}",
                    list(&model.inputs),
                    list(&model.outputs)
                );
                models.entry(name.clone()).or_default().insert(number, Arc::new(model));
            }
        }
        if let Some((text, _)) = asked.iter().find(|(_, found)| !found) {
            bail!(
                "--only {text}: there is no {text}/model.onnx or {text}/VERSION/model.onnx in {}",
                dir.display()
            );
        }
        ensure!(!models.is_empty(), "there is no NAME/VERSION/model.onnx in {}", dir.display());
        Ok(Self { models })
    }

    /// One version, or the newest when none is named.
    pub(crate) fn find(&self, name: &str, version: Option<&str>) -> Result<&Arc<Model>, Refusal> {
        let Some(versions) = self.models.get(name) else {
            let known: Vec<_> = self.models.keys().map(String::as_str).collect();
            return Err(Refusal::NotFound(format!(
                "there is no model {name:?} here; there is {}",
                known.join(", ")
            )));
        };
        let found = match version.filter(|version| !version.is_empty()) {
            None => versions.values().next_back(),
            Some(version) => version.parse().ok().and_then(|number: u64| versions.get(&number)),
        };
        found.ok_or_else(|| {
            let known = self.versions(name).join(", ");
            Refusal::NotFound(format!(
                "model {name:?} has no version {:?} here; there is {known}",
                version.unwrap_or_default()
            ))
        })
    }

    /// What can be said of a model without asking it.
    pub(crate) fn metadata(&self, model: &Model, simulated: bool) -> ModelMetadata {
        ModelMetadata {
            name: model.identity.name.clone(),
            versions: self.versions(&model.identity.name),
            platform: if simulated { "onnx_tract_simulated_delay" } else { "onnx_tract" }.into(),
            inputs: model.inputs.clone(),
            outputs: model.outputs.clone(),
        }
    }

    fn versions(&self, name: &str) -> Vec<String> {
        self.models.get(name).into_iter().flat_map(|versions| versions.keys().map(u64::to_string)).collect()
    }

    /// Every model.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.values().flat_map(BTreeMap::values)
    }
}

fn directories(dir: &Path) -> anyhow::Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

impl Model {
    fn load(file: &Path, identity: Identity, max_batch: u64) -> anyhow::Result<Self> {
        let model = tract_onnx::onnx().model_for_path(file)?;
        // Labels are the names in the file; optimisation may lose them.
        let name = |outlet: &OutletId| match model.outlet_label(*outlet) {
            Some(label) => label.to_owned(),
            None => model.nodes[outlet.node].name.clone(),
        };
        let inputs: Vec<_> = model.input_outlets()?.iter().map(name).collect();
        let outputs: Vec<_> = model.output_outlets()?.iter().map(name).collect();
        let model = model.into_optimized()?;
        let inputs = inputs.into_iter().enumerate().map(|(i, name)| tensor(name, model.input_fact(i)?));
        let outputs = outputs.into_iter().enumerate().map(|(i, name)| tensor(name, model.output_fact(i)?));
        let (inputs, outputs) =
            (inputs.collect::<anyhow::Result<_>>()?, outputs.collect::<anyhow::Result<_>>()?);
        let plan = model.into_runnable()?;
        Ok(Self { identity, inputs, outputs, stats: Stats::default(), max_batch, plan })
    }

    /// Whether the model can be asked this; how many rows it is.
    pub(crate) fn check(&self, request: &InferRequest) -> Result<u64, Refusal> {
        let refuse = |sentence: String| Err(Refusal::Invalid(sentence));
        let Identity { name, version } = &self.identity;
        let mut rows = None;
        for wanted in &self.inputs {
            let mut given = request.inputs.iter().filter(|input| input.name == wanted.name);
            let Some(input) = given.next() else {
                return refuse(format!(
                    "input {:?} of model {name} version {version} is missing",
                    wanted.name
                ));
            };
            if given.next().is_some() {
                return refuse(format!("input {:?} is there twice", wanted.name));
            }
            if input.datatype != wanted.datatype {
                let (given, wanted) = (input.datatype, wanted.datatype);
                return refuse(format!("input {:?} is {given}, but the model takes {wanted}", input.name));
            }
            let fits = |(given, wanted): (&u64, &i64)| *wanted < 0 || u64::try_from(*wanted) == Ok(*given);
            if input.shape.len() != wanted.shape.len() || !input.shape.iter().zip(&wanted.shape).all(fits) {
                let (given, wanted) = (&input.shape, &wanted.shape);
                return refuse(format!(
                    "input {:?} has shape {given:?}, but the model takes {wanted:?}",
                    input.name
                ));
            }
            if wanted.shape.first() == Some(&-1) {
                let here = input.shape[0];
                if *rows.get_or_insert(here) != here {
                    return refuse(format!(
                        "input {:?} has {here} rows, but another input does not",
                        input.name
                    ));
                }
            }
        }
        if let Some(input) = request.inputs.iter().find(|input| !has(&self.inputs, &input.name)) {
            return refuse(format!(
                "the model has no input {:?}; it takes {}",
                input.name,
                list(&self.inputs)
            ));
        }
        for output in &request.outputs {
            if !has(&self.outputs, &output.name) {
                return refuse(format!(
                    "the model has no output {:?}; it gives {}",
                    output.name,
                    list(&self.outputs)
                ));
            }
            if output.parameters.contains_key("classification") {
                return refuse(format!(
                    "output {:?}: the classification extension is not served here",
                    output.name
                ));
            }
        }
        match rows.unwrap_or(1) {
            0 => refuse("the batch has no rows".into()),
            rows if rows > self.max_batch => {
                refuse(format!("the batch has {rows} rows, and at most {} are taken", self.max_batch))
            }
            rows => Ok(rows),
        }
    }

    /// Inputs as the model takes them. The request must have passed [`check`](Self::check).
    pub(crate) fn inputs(&self, request: &InferRequest) -> anyhow::Result<TVec<TValue>> {
        let wanted =
            self.inputs.iter().filter_map(|wanted| request.inputs.iter().find(|i| i.name == wanted.name));
        wanted.map(tract_tensor).collect()
    }

    /// Runs the model.
    pub(crate) fn run(&self, inputs: TVec<TValue>) -> anyhow::Result<TVec<TValue>> {
        self.plan.run(inputs)
    }

    /// The outputs that the request asks for, in its order; all of them, if it names none.
    pub(crate) fn outputs(
        &self,
        request: &InferRequest,
        found: &[TValue],
    ) -> anyhow::Result<Vec<oip::Tensor>> {
        let tensor = |(metadata, value): (&TensorMetadata, &TValue)| {
            let shape = value.shape().iter().map(|dimension| *dimension as u64).collect();
            anyhow::Ok(oip::Tensor {
                name: metadata.name.clone(),
                datatype: metadata.datatype,
                shape,
                parameters: Parameters::new(),
                data: bytes::Bytes::copy_from_slice(value.try_as_plain_ram()?.as_bytes()),
            })
        };
        let all = || self.outputs.iter().zip(found);
        if request.outputs.is_empty() {
            return all().map(tensor).collect();
        }
        let named =
            request.outputs.iter().filter_map(|wanted| all().find(|(output, _)| output.name == wanted.name));
        named.map(tensor).collect()
    }
}

fn has(tensors: &[TensorMetadata], name: &str) -> bool {
    tensors.iter().any(|tensor| tensor.name == name)
}

fn list(tensors: &[TensorMetadata]) -> String {
    tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The protocol's datatypes that tract computes with. BYTES and BF16 are not among them.
const DATATYPES: [(DatumType, Datatype); 12] = [
    (DatumType::Bool, Datatype::Bool),
    (DatumType::U8, Datatype::Uint8),
    (DatumType::U16, Datatype::Uint16),
    (DatumType::U32, Datatype::Uint32),
    (DatumType::U64, Datatype::Uint64),
    (DatumType::I8, Datatype::Int8),
    (DatumType::I16, Datatype::Int16),
    (DatumType::I32, Datatype::Int32),
    (DatumType::I64, Datatype::Int64),
    (DatumType::F16, Datatype::Fp16),
    (DatumType::F32, Datatype::Fp32),
    (DatumType::F64, Datatype::Fp64),
];

fn tensor(name: String, fact: &TypedFact) -> anyhow::Result<TensorMetadata> {
    let known = DATATYPES.into_iter().find(|(tract, _)| *tract == fact.datum_type);
    let (_, datatype) =
        known.with_context(|| format!("{name:?} is {:?}, which is not served", fact.datum_type))?;
    let shape = fact.shape.iter().map(|dimension| dimension.to_i64().unwrap_or(-1)).collect();
    Ok(TensorMetadata { name, datatype, shape })
}

fn tract_tensor(tensor: &oip::Tensor) -> anyhow::Result<TValue> {
    let known = DATATYPES.into_iter().find(|(_, datatype)| *datatype == tensor.datatype);
    let (datum, _) = known.with_context(|| format!("{} is not served", tensor.datatype))?;
    let shape: Result<Vec<usize>, _> =
        tensor.shape.iter().map(|dimension| usize::try_from(*dimension)).collect();
    let mut value = Tensor::zero_dt(datum, &shape?)?;
    // Little-endian, as every machine is that this runs on.
    value.as_bytes_mut().copy_from_slice(&tensor.data);
    Ok(value.into_tvalue())
}
