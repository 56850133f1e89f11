//! The step with photographs: an `InferencePolicy` has the sidecar of the model decode and resize what clients send as JPEGs.
//!
//! Beside it, for comparison, a client that does so itself, with the same library, and sends finished tensors. The
//! photographs and the model are those of tests/models/photos.py: views of ten photographs, and a linear classifier that says of which
//! one. What onnxruntime and Pillow made of each view is in photos.json, so that answers can be held to it.

use std::io;
use std::net::SocketAddrV4;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::oip::{Datatype, InferRequest, Tensor, rest};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Declaration, Limits, Pipeline, Preset, Scratch};
use serde::{Deserialize, Serialize};

use super::digits::{Form, Question};
use super::load::Tally;
use super::sharing::{Sharing, page, value};

/// The name of the model.
pub(crate) const MODEL: &str = "photos";
/// The path of an inference request.
pub(crate) const INFER: &str = "/v2/models/photos/infer";

static NETWORK: &[u8] = include_bytes!("../../../../tests/models/repository/photos/1/model.onnx");

macro_rules! views {
    ($($name:literal),*) => {
        [$([
            include_bytes!(concat!("../../../../tests/models/photos/", $name, "-1.jpg")).as_slice(),
            include_bytes!(concat!("../../../../tests/models/photos/", $name, "-2.jpg")).as_slice(),
            include_bytes!(concat!("../../../../tests/models/photos/", $name, "-3.jpg")).as_slice(),
            include_bytes!(concat!("../../../../tests/models/photos/", $name, "-4.jpg")).as_slice(),
        ]),*]
    };
}

/// Four views of each photograph, in the order of the model's classes.
static VIEWS: [[&[u8]; 4]; 10] = views![
    "astronaut",
    "bricks",
    "cameraman",
    "cat",
    "coffee",
    "galaxies",
    "grass",
    "gravel",
    "retina",
    "rocket"
];

/// Says how a JPEG becomes what the model takes.
pub(super) fn policy(namespace: &str, service: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: {service}, namespace: {namespace}}}\n\
         spec:\n  targetRef: {{kind: Service, name: {service}}}\n  models:\n    - name: {MODEL}\n      prepare:\n        \
         - {{input: image, tensor: pixels, pipeline: {{preset: imagenet, dtype: f16}}}}\n"
    )
}

/// Writes the model into a model repository.
pub(super) fn write_model(directory: &Path) -> io::Result<()> {
    // Version 2 as the replica that is asked for it, so that the live table goes on to count for version 2.
    let directory = directory.join(MODEL).join("2");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("model.onnx"), NETWORK)
}

/// All views as requests; those that follow each other are of different photographs.
fn questions(form: &Form) -> Vec<Question> {
    let views = (0..4).flat_map(|view| VIEWS.iter().map(move |views| views[view]).zip(0_u8..));
    let question =
        |(jpeg, class)| Question { path: INFER, form: form.clone(), body: Bytes::from_static(jpeg), class };
    views.map(question).collect()
}

/// Views that are sent as they are.
pub(super) fn jpegs() -> Vec<Question> {
    questions(&Form::Jpeg)
}

/// Views of which the client makes tensors.
pub(super) fn own() -> Result<Vec<Question>, String> {
    Ok(questions(&Form::Own(Arc::new(Maker::new()?))))
}

/// What a client needs that prepares by itself, as the policy says.
pub(crate) struct Maker {
    pipeline: Pipeline,
    /// One for each thread that is at it.
    scratch: Mutex<Vec<Scratch>>,
}

impl std::fmt::Debug for Maker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maker").field("pipeline", &self.pipeline).finish_non_exhaustive()
    }
}

impl Maker {
    fn new() -> Result<Self, String> {
        let declaration =
            Declaration { preset: Some(Preset::Imagenet), dtype: Some(Dtype::F16), ..Declaration::default() };
        let pipeline = Pipeline::new(&declaration).map_err(|e| e.to_string())?;
        Ok(Self { pipeline, scratch: Mutex::default() })
    }

    /// Bytes of a tensor.
    fn bytes(&self) -> usize {
        self.pipeline.bytes()
    }

    /// The request, and how many bytes of it are JSON.
    pub(crate) fn request(&self, jpeg: &[u8]) -> Result<(Bytes, Option<usize>), String> {
        let lock = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = lock().pop().unwrap_or_default();
        let mut data = vec![0; self.bytes()];
        self.pipeline
            .run(jpeg, &mut data, &mut scratch, &Limits::default(), &|| false)
            .map_err(|e| e.to_string())?;
        lock().push(scratch);
        let shape = std::iter::once(1).chain(self.pipeline.shape().map(|side| side as u64)).collect();
        let parameters = Default::default();
        let tensor = Tensor {
            name: "pixels".to_owned(),
            datatype: Datatype::Fp16,
            shape,
            parameters,
            data: data.into(),
        };
        let request = InferRequest { inputs: vec![tensor], ..InferRequest::default() };
        let body = rest::encode_request(&request, true).map_err(|e| e.to_string())?;
        let length = body.header_length;
        Ok((body.into_bytes(), length))
    }
}

/// What sidecars have spent on preparing so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Prepared {
    tensors: f64,
    seconds: f64,
}

impl Prepared {
    /// The sum over the sidecars with these admin addresses; one that does not answer has prepared nothing.
    pub(super) async fn read(admins: &[SocketAddrV4]) -> Self {
        let mut sum = Self::default();
        for admin in admins {
            let page = page(*admin).await.unwrap_or_default();
            sum.tensors += value(&page, "penstock_prepared_total{result=\"done\"}");
            sum.seconds += value(&page, "penstock_prepare_busy_seconds");
        }
        sum
    }
}

/// CPU time: of the client, and of everybody else on the way, which are both sidecars and the model server.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cpu {
    /// Of this process, with all that the demo watches meanwhile.
    pub(super) client: Duration,
    /// Of the others.
    pub(super) others: Duration,
}

/// One way to have photographs answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Photographs that were sent.
    pub(crate) requests: u64,
    /// How long that took.
    pub(crate) seconds: f64,
    /// Right answers of all answers; absent without answers.
    pub(crate) accuracy: Option<f64>,
    /// Bytes that the client sent for one.
    pub(crate) bytes: f64,
    /// CPU time that the client spent on one, in milliseconds; absent where it is not known.
    pub(crate) client_cpu_ms: Option<f64>,
    /// CPU time that all spent on one: client, sidecars and model server.
    pub(crate) cpu_ms: Option<f64>,
}

impl Way {
    /// From what was counted; `cpu` is before and after.
    pub(super) fn of(tally: &Tally, lasted: Duration, bytes: f64, cpu: [Option<Cpu>; 2]) -> Self {
        let [one, two] = &tally.versions;
        let answers = one.answers + two.answers;
        let [before, after] = cpu;
        let spent = before.zip(after).filter(|_| tally.requests > 0);
        let each = |spent: Duration| spent.as_secs_f64() * 1e3 / tally.requests as f64;
        let client = spent.map(|(before, after)| after.client.saturating_sub(before.client));
        let others = spent.map(|(before, after)| after.others.saturating_sub(before.others));
        Self {
            requests: tally.requests,
            seconds: lasted.as_secs_f64(),
            accuracy: (answers > 0).then(|| (one.correct + two.correct) as f64 / answers as f64),
            bytes,
            client_cpu_ms: client.map(each),
            cpu_ms: client.zip(others).map(|(client, others)| each(client + others)),
        }
    }

    /// Photographs a second.
    pub(crate) fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.requests as f64 / self.seconds } else { 0.0 }
    }
}

/// Bytes that a client sends for one of these photographs on average.
pub(super) fn mean_bytes(questions: &[Question]) -> f64 {
    let bytes = |question: &Question| match &question.form {
        Form::Own(maker) => maker.bytes(),
        Form::Jpeg | Form::Tensor { .. } => question.body.len(),
    };
    questions.iter().map(bytes).sum::<usize>() as f64 / questions.len().max(1) as f64
}

/// What became of the photographs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Photos {
    /// Sent as JPEGs.
    pub(crate) jpegs: Way,
    /// Sent as tensors by a client that prepares itself.
    pub(crate) own: Way,
    /// Tensors that the sidecar made.
    pub(crate) prepared: u64,
    /// What one of them took of a thread.
    pub(crate) prepare_ms: f64,
    /// Photographs that an execution had on average.
    pub(crate) rows_per_batch: f64,
    /// Executions at the model servers, and those of them whose tensors were in memory that the server reads too.
    #[serde(default)]
    pub(crate) executions: u64,
    /// As above.
    #[serde(default)]
    pub(crate) executions_placed: u64,
}

impl Photos {
    /// From what was counted before and after the JPEGs.
    pub(super) fn of(jpegs: Way, own: Way, prepared: [Prepared; 2], sharing: Sharing) -> Self {
        let [before, after] = prepared;
        let tensors = (after.tensors - before.tensors).max(0.0);
        Self {
            jpegs,
            own,
            prepared: tensors as u64,
            prepare_ms: if tensors > 0.0 { (after.seconds - before.seconds) * 1e3 / tensors } else { 0.0 },
            rows_per_batch: sharing.rows_per_batch(),
            executions: sharing.executions,
            executions_placed: sharing.placed,
        }
    }

    /// How many times as much a client sends that prepares itself.
    pub(crate) fn bytes_saved(self) -> f64 {
        if self.jpegs.bytes > 0.0 { self.own.bytes / self.jpegs.bytes } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::VersionTally;
    use super::*;

    #[test]
    fn what_was_counted_before_is_not_the_photographs() {
        let tally = Tally {
            requests: 100,
            versions: [VersionTally { answers: 100, correct: 95 }, VersionTally::default()],
            ..Tally::default()
        };
        let cpu = |client, others| {
            Some(Cpu { client: Duration::from_millis(client), others: Duration::from_millis(others) })
        };
        let second = Duration::from_secs(1);
        let way = Way::of(&tally, 2 * second, 5e4, [cpu(1000, 4000), cpu(1050, 4450)]);
        assert_eq!((way.rate(), way.accuracy), (50.0, Some(0.95)));
        assert_eq!((way.client_cpu_ms, way.cpu_ms), (Some(0.5), Some(5.0)));
        assert_eq!(Way::of(&tally, second, 5e4, [None, cpu(1, 1)]).cpu_ms, None);
        let prepared = [Prepared { tensors: 7.0, seconds: 1.0 }, Prepared { tensors: 107.0, seconds: 1.25 }];
        let sharing = Sharing { batches: 50, rows: 100, placed: 40, ..Sharing::default() };
        let own = Way { bytes: 3e5, ..way };
        let photos = Photos::of(way, own, prepared, sharing);
        assert_eq!((photos.prepared, photos.prepare_ms), (100, 2.5));
        assert_eq!((photos.rows_per_batch, photos.bytes_saved(), photos.executions_placed), (2.0, 6.0, 40));
    }

    #[test]
    fn the_policy_makes_what_a_client_would() {
        let policy: serde_json::Value = serde_saphyr::from_str(&policy("demo", "digits-v2")).unwrap();
        let model = &policy["spec"]["models"][0];
        assert_eq!((&model["name"], &model["prepare"][0]["tensor"]), (&MODEL.into(), &"pixels".into()));
        let declared: Declaration = serde_json::from_value(model["prepare"][0]["pipeline"].clone()).unwrap();
        let declared = Pipeline::new(&declared).unwrap();
        let maker = Maker::new().unwrap();
        assert_eq!((declared.shape(), declared.dtype()), (maker.pipeline.shape(), maker.pipeline.dtype()));
        let (body, length) = maker.request(VIEWS[3][0]).unwrap();
        let request = rest::decode_request(&body, length).unwrap();
        assert_eq!(request.inputs[0].shape, [1, 3, 224, 224]);
        assert_eq!(request.inputs[0].data.len(), 2 * 3 * 224 * 224);
    }

    #[test]
    fn every_photograph_is_asked_for_in_turn() {
        let card = include_str!("../../../../tests/models/photos/photos.json");
        let card: serde_json::Value = serde_json::from_str(card).unwrap();
        let questions = jpegs();
        assert_eq!(questions.len(), card["views"].as_object().unwrap().len());
        for (at, question) in questions.iter().enumerate() {
            assert_eq!(usize::from(question.class), at % 10);
            assert!(question.body.starts_with(b"\xff\xd8"));
            let name = card["classes"][at % 10].as_str().unwrap();
            assert_eq!(card["views"][format!("{name}-{}.jpg", at / 10 + 1)]["class"], at % 10);
        }
        let jpeg = mean_bytes(&questions);
        assert!((1e4..1e5).contains(&jpeg), "{jpeg}");
        assert_eq!(mean_bytes(&own().unwrap()), 301_056.0);
    }
}
