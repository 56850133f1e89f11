//! The requests of the batching bed, as bytes for the load generator.

use std::fmt::Write as _;

use serde_json::json;

use super::case::Body;

/// The model's name, on every server.
pub(crate) const MODEL: &str = "rowsum";

/// The one row that is sent: whole numbers, so that its sum is exact.
fn row(values: usize) -> impl Iterator<Item = u8> + Clone {
    (0..values).map(|at| (at % 7) as u8)
}

/// What `total` must be.
pub(crate) fn total(values: usize) -> u64 {
    row(values).map(u64::from).sum()
}

/// Where it is posted; `v1`: in KServe's old protocol.
pub(crate) fn path(v1: bool) -> String {
    if v1 { format!("/v1/models/{MODEL}:predict") } else { format!("/v2/models/{MODEL}/infer") }
}

/// The body, and for a binary one how long the JSON before the tensor is.
pub(crate) fn body(body: Body, v1: bool) -> (Vec<u8>, Option<usize>) {
    let values = body.values();
    let numbers: Vec<u8> = row(values).collect();
    if v1 {
        return (json!({"instances": [numbers]}).to_string().into_bytes(), None);
    }
    let shape = [1, values];
    let outputs = json!([{"name": "total"}]);
    if let Body::Json { .. } = body {
        let input = json!({"name": "values", "datatype": "FP32", "shape": shape, "data": numbers});
        return (json!({"inputs": [input], "outputs": outputs}).to_string().into_bytes(), None);
    }
    let parameters = json!({"binary_data_size": values * 4});
    let input = json!({"name": "values", "datatype": "FP32", "shape": shape, "parameters": parameters});
    let mut head = json!({"inputs": [input], "outputs": outputs});
    if let Body::Sequence { .. } = body {
        head["parameters"] = json!({"sequence_id": 7, "sequence_start": true, "sequence_end": true});
    }
    let mut bytes = head.to_string().into_bytes();
    let json = bytes.len();
    bytes.extend(row(values).flat_map(|value| f32::from(value).to_le_bytes()));
    (bytes, Some(json))
}

/// The whole request.
pub(crate) fn bytes(host: &str, of: Body, v1: bool) -> Vec<u8> {
    let (body, json) = body(of, v1);
    let mut head =
        format!("POST {} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n", path(v1), body.len());
    match json {
        Some(length) => {
            let _ = write!(
                head,
                "content-type: application/octet-stream\r\ninference-header-content-length: {length}\r\n"
            );
        }
        None => head.push_str("content-type: application/json\r\n"),
    }
    head.push_str("\r\n");
    [head.into_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tensor_begins_where_the_header_says() {
        let (bytes, json) = body(Body::Binary { values: 9 }, false);
        let (head, tensor) = bytes.split_at(json.unwrap());
        assert!(serde_json::from_slice::<serde_json::Value>(head).is_ok());
        assert_eq!(tensor.len(), 36);
        assert_eq!(tensor[4..8], 1.0_f32.to_le_bytes());
        assert_eq!(total(9), 21 + 1);
    }

    #[test]
    fn only_the_old_protocol_has_instances() {
        let text = |v1| String::from_utf8(bytes("h", Body::Json { values: 2 }, v1)).unwrap();
        assert!(
            text(true).starts_with("POST /v1/models/rowsum:predict ")
                && text(true).ends_with(r#"{"instances":[[0,1]]}"#)
        );
        assert!(text(false).contains("\"shape\":[1,2]"));
    }
}
