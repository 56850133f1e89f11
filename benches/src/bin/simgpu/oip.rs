//! Requests for tensors: the Open Inference Protocol over REST, with and without the binary extension, and OpenAI
//! embeddings, whose rows are their inputs.

use serde::Deserialize;
use serde_json::{Value, json};

/// Of an inference request, what its cost depends on.
#[derive(Deserialize)]
struct Infer {
    inputs: Vec<Input>,
    #[serde(default)]
    id: Option<String>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    shape: Vec<u64>,
}

#[derive(Deserialize)]
struct Embeddings {
    input: Value,
}

/// What a request asks for, and how it will be answered.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Rows of the batch.
    pub(crate) rows: u32,
    /// The answer, when it is time.
    pub(crate) answer: Value,
}

/// Reads an inference request; `json_length` is what the binary extension's header says.
pub(crate) fn infer(model: &str, body: &[u8], json_length: Option<usize>) -> Result<Asked, String> {
    let json = match json_length {
        Some(length) => {
            body.get(..length).ok_or_else(|| format!("the body has {} bytes, not {length}", body.len()))?
        }
        None => body,
    };
    let infer: Infer = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let input = infer.inputs.first().ok_or("the request has no inputs")?;
    let rows = input.shape.first().copied().unwrap_or(1);
    let rows = u32::try_from(rows).ok().filter(|rows| *rows > 0);
    let rows = rows.ok_or_else(|| format!("{} has the shape {:?}", input.name, input.shape))?;
    let zeros = vec![0; rows as usize];
    let output = json!({"name": "simulated", "datatype": "FP32", "shape": [rows, 1], "data": zeros});
    let mut answer = json!({"model_name": model, "model_version": "1", "outputs": [output]});
    if let Some(id) = infer.id {
        answer["id"] = id.into();
    }
    Ok(Asked { rows, answer })
}

/// Reads a request for embeddings.
pub(crate) fn embeddings(model: &str, body: &[u8]) -> Result<Asked, String> {
    let asked: Embeddings = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let texts: Vec<&str> = match &asked.input {
        Value::String(text) => vec![text],
        Value::Array(texts) => texts.iter().map(|text| text.as_str().unwrap_or_default()).collect(),
        other => return Err(format!("input is neither a text nor a list of them: {other}")),
    };
    let rows = u32::try_from(texts.len()).ok().filter(|rows| *rows > 0).ok_or("input is empty")?;
    let tokens: u32 = texts.iter().map(|text| super::tokens::count(text)).sum();
    let data: Vec<Value> =
        (0..rows).map(|index| json!({"object": "embedding", "index": index, "embedding": [0.0]})).collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Asked { rows, answer: json!({"object": "list", "model": model, "data": data, "usage": usage}) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_are_the_first_dimension() {
        let body =
            br#"{"id":"7","inputs":[{"name":"x","datatype":"FP32","shape":[3,2],"data":[1,2,3,4,5,6]}]}"#;
        let asked = infer("sim", body, None).unwrap();
        assert_eq!(
            (asked.rows, &asked.answer["id"], &asked.answer["outputs"][0]["shape"]),
            (3, &json!("7"), &json!([3, 1]))
        );
        let binary = [&body[..], b"\0\0\0\0"].concat();
        assert_eq!(infer("sim", &binary, Some(body.len())).unwrap().rows, 3);
        assert!(infer("sim", &binary, None).is_err());
        for wrong in [&b"{}"[..], b"{\"inputs\":[]}", br#"{"inputs":[{"name":"x","shape":[0]}]}"#] {
            assert!(infer("sim", wrong, None).is_err());
        }
    }

    #[test]
    fn each_text_is_a_row() {
        assert_eq!(
            embeddings("sim", br#"{"input":"abcdefgh"}"#).unwrap().answer["usage"]["prompt_tokens"],
            2
        );
        assert_eq!(embeddings("sim", br#"{"input":["a","b","c"]}"#).unwrap().rows, 3);
        assert!(embeddings("sim", br#"{"input":[]}"#).is_err());
        assert!(embeddings("sim", br#"{"input":7}"#).is_err());
    }
}
