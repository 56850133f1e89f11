//! `InferencePolicy`: what the owner of a Service in front of models asks of the proxies, in one object.
//!
//! Its settings are those of the Service's annotations, in the same words, as a text (`batch: "max=32,delay=2ms"`) or as a
//! mapping (`batch: {max: 32, delay: 2ms}`). What annotations have no room for stands here alone: how inputs are prepared.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use penstock_prepare::Declaration;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "as in every Kubernetes object")]
pub struct InferencePolicy {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    pub spec: Spec,
}

/// What it asks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// For which Service of its namespace.
    pub target_ref: TargetRef,
    /// What is different from model to model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelRules>,
    /// The settings of the annotations of the same names.
    #[serde(flatten)]
    pub settings: Settings,
}

/// What a policy is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRef {
    /// `Service`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// Rules for a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelRules {
    /// The model; `*`: all of the Service that no other rules name.
    pub name: String,
    /// Inputs that clients send in another form than the model takes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepare: Vec<Prepare>,
}

/// How one input is prepared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// Its name, as clients send it.
    pub input: String,
    /// Its name, as the model takes it; the same unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// The dimensions of a row, as the model takes it, if they are other than the pipeline's: `[64]` for `[1, 8, 8]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<u64>,
    /// How (docs/PIPELINES.md).
    pub pipeline: Declaration,
}

/// Settings that annotations have too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "each is the annotation of the same name")]
pub struct Settings {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coalesce: Option<Value>,
}

impl Settings {
    /// The setting of that name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        match name {
            "balance" => self.balance.as_ref(),
            "sticky" => self.sticky.as_ref(),
            "timeout" => self.timeout.as_ref(),
            "retry" => self.retry.as_ref(),
            "outlier" => self.outlier.as_ref(),
            "limits" => self.limits.as_ref(),
            "batch" => self.batch.as_ref(),
            "coalesce" => self.coalesce.as_ref(),
            _ => None,
        }
    }
}

/// A setting in the words of its annotation: a mapping is `key=value` by comma, `true` the key alone, a list its items by plus.
pub fn words(setting: &Value) -> Result<String, String> {
    fn word(value: &Value) -> Option<String> {
        match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Array(items) => Some(items.iter().map(word).collect::<Option<Vec<_>>>()?.join("+")),
            Value::Null | Value::Bool(_) | Value::Object(_) => None,
        }
    }
    match setting {
        Value::Object(entries) => {
            let words = entries.iter().filter_map(|(key, value)| match value {
                Value::Bool(true) => Some(Ok(key.clone())),
                Value::Bool(false) => None,
                value => Some(word(value).map(|word| format!("{key}={word}")).ok_or_else(|| {
                    format!("{key}: {value} is neither a text nor a number; write e.g. `{key}: 32`")
                })),
            });
            Ok(words.collect::<Result<Vec<_>, _>>()?.join(","))
        }
        other => word(other).ok_or_else(|| format!("{other} is neither a text nor a mapping")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_mapping_says_what_the_annotation_would() {
        let table = [
            (json!("max=32,delay=2ms"), "max=32,delay=2ms"),
            (json!({"max": 32, "delay": "2ms"}), "delay=2ms,max=32"),
            (
                json!({"single-flight": true, "shared": false, "headers": ["a", "b"]}),
                "headers=a+b,single-flight",
            ),
            (json!("gpu"), "gpu"),
        ];
        for (setting, expected) in table {
            let words = words(&setting).unwrap();
            let sorted = |text: &str| {
                let mut words: Vec<_> = text.split(',').map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(sorted(&words), sorted(expected), "{setting}");
        }
        assert!(words(&json!({"max": {}})).unwrap_err().contains("max: {} is neither"));
        assert!(words(&json!(null)).is_err());
    }
}
