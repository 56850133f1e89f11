//! The step with pictures: an `InferencePolicy` has the sidecar of the model decode and resize what clients send as JPEGs.

use std::net::SocketAddrV4;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::load::Tally;
use super::sharing::{Sharing, page, value};

/// Says how a JPEG becomes what the model takes: 8 by 8 pixels in 17 grays.
pub(super) fn policy(namespace: &str, service: &str, model: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: {service}, namespace: {namespace}}}\n\
         spec:\n  targetRef: {{kind: Service, name: {service}}}\n  models:\n    - name: {model}\n      prepare:\n        \
         - input: picture\n          tensor: image\n          shape: [64]\n          pipeline:\n            \
         resize: {{mode: exact, width: 8, height: 8}}\n            colour: gray\n            \
         normalise: {{scale: 0.06274509803921569}}\n"
    )
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

/// What became of the pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pictures {
    /// JPEGs that were sent.
    pub(crate) requests: u64,
    /// How long that took.
    pub(crate) seconds: f64,
    /// Right answers of all answers; absent without answers.
    pub(crate) accuracy: Option<f64>,
    /// Tensors that the sidecar made.
    pub(crate) prepared: u64,
    /// What one of them took of a thread.
    pub(crate) prepare_ms: f64,
    /// Pictures that an execution had on average.
    pub(crate) rows_per_batch: f64,
}

impl Pictures {
    /// From what was counted before and after.
    pub(super) fn of(tally: &Tally, lasted: Duration, prepared: [Prepared; 2], sharing: Sharing) -> Self {
        let [before, after] = prepared;
        let tensors = (after.tensors - before.tensors).max(0.0);
        let [one, two] = &tally.versions;
        let answers = one.answers + two.answers;
        Self {
            requests: tally.requests,
            seconds: lasted.as_secs_f64(),
            accuracy: (answers > 0).then(|| (one.correct + two.correct) as f64 / answers as f64),
            prepared: tensors as u64,
            prepare_ms: if tensors > 0.0 { (after.seconds - before.seconds) * 1e3 / tensors } else { 0.0 },
            rows_per_batch: sharing.rows_per_batch(),
        }
    }

    /// Pictures a second.
    pub(crate) fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.requests as f64 / self.seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::VersionTally;
    use super::*;

    #[test]
    fn what_was_counted_before_is_not_the_pictures() {
        let tally = Tally {
            requests: 100,
            versions: [VersionTally::default(), VersionTally { answers: 100, correct: 98 }],
            ..Tally::default()
        };
        let prepared = [Prepared { tensors: 7.0, seconds: 1.0 }, Prepared { tensors: 107.0, seconds: 1.25 }];
        let sharing = Sharing { batches: 50, rows: 100, ..Sharing::default() };
        let pictures = Pictures::of(&tally, Duration::from_secs(2), prepared, sharing);
        assert_eq!((pictures.prepared, pictures.prepare_ms, pictures.rate()), (100, 2.5, 50.0));
        assert_eq!((pictures.accuracy, pictures.rows_per_batch), (Some(0.98), 2.0));
    }

    #[test]
    fn the_policy_makes_what_the_model_takes() {
        let policy: serde_json::Value =
            serde_saphyr::from_str(&policy("demo", "digits-v2", "digits")).unwrap();
        let prepare = &policy["spec"]["models"][0]["prepare"][0];
        assert_eq!((&prepare["tensor"], &prepare["shape"][0]), (&"image".into(), &64.into()));
        assert_eq!(prepare["pipeline"]["resize"]["width"], 8);
    }
}
