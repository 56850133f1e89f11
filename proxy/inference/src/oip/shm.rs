//! Tensors in system shared memory (Triton's "shared memory extension"): the message says where they lie, and the server
//! reads and writes them there.
//!
//! A region is registered with the server once ([`register`]); a tensor that lies in it carries the parameters that
//! [`place`] gives it.

use bytes::Bytes;
use serde_json::json;

use super::{Parameter, Parameters, Tensor};

/// The parameter that names the region.
pub const REGION: &str = "shared_memory_region";
const OFFSET: &str = "shared_memory_offset";
const SIZE: &str = "shared_memory_byte_size";

/// Where bytes lie in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// From the beginning of the region.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// Path and body of the REST request that registers a region: the shared memory object `/key`, as `shm_open` names it.
pub fn register(region: &str, key: &str, bytes: u64) -> (String, Bytes) {
    let body = json!({"key": key, "offset": 0, "byte_size": bytes});
    (format!("/v2/systemsharedmemory/region/{region}/register"), body.to_string().into())
}

/// The path of the REST request that takes a region back.
pub fn unregister(region: &str) -> String {
    format!("/v2/systemsharedmemory/region/{region}/unregister")
}

/// The parameters of a tensor that lies there.
pub fn place(region: &str, span: Span) -> Parameters {
    let number = |value: u64| i64::try_from(value).map_or(Parameter::Uint(value), Parameter::Int);
    let offset = (span.offset > 0).then(|| (OFFSET.to_owned(), number(span.offset)));
    [(REGION.to_owned(), Parameter::String(region.to_owned())), (SIZE.to_owned(), number(span.bytes))]
        .into_iter()
        .chain(offset)
        .collect()
}

/// How many bytes of its place a tensor takes, as the server says; `None`: it does not lie in shared memory.
pub fn taken(tensor: &Tensor) -> Option<u64> {
    match (tensor.parameters.get(REGION)?, tensor.parameters.get(SIZE)?) {
        (Parameter::String(_), Parameter::Int(bytes)) => u64::try_from(*bytes).ok(),
        (Parameter::String(_), Parameter::Uint(bytes)) => Some(*bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oip::{Datatype, InferRequest, RequestedOutput, rest};

    #[test]
    fn a_region_is_registered_as_triton_wants_it() {
        let (path, body) = register("arena", "/penstock-1", 4096);
        assert_eq!(path, "/v2/systemsharedmemory/region/arena/register");
        assert_eq!(body, r#"{"byte_size":4096,"key":"/penstock-1","offset":0}"#);
        assert_eq!(unregister("arena"), "/v2/systemsharedmemory/region/arena/unregister");
    }

    #[test]
    fn a_tensor_in_shared_memory_has_no_data_in_the_message() {
        let span = Span { offset: 64, bytes: 16 };
        let input = Tensor {
            name: "x".into(),
            datatype: Datatype::Fp32,
            shape: vec![2, 2],
            parameters: place("arena", span),
            data: Bytes::new(),
        };
        let outputs = vec![RequestedOutput { name: "y".into(), parameters: place("arena", span) }];
        let request = InferRequest { inputs: vec![input], outputs, ..InferRequest::default() };
        let body = rest::encode_request(&request, true).unwrap();
        assert_eq!(body.header_length, None);
        let text = String::from_utf8(body.into_bytes().to_vec()).unwrap();
        assert_eq!(
            text,
            r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,2],"parameters":{"shared_memory_byte_size":16,"shared_memory_offset":64,"shared_memory_region":"arena"}}],"outputs":[{"name":"y","parameters":{"shared_memory_byte_size":16,"shared_memory_offset":64,"shared_memory_region":"arena"}}]}"#
        );
        // What a client says of shared memory is not ours to read.
        assert!(rest::decode_request(&text.into(), None).is_err());
    }

    #[test]
    fn an_output_in_shared_memory_is_found_there() {
        let text = r#"{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[2],
            "parameters":{"shared_memory_region":"arena","shared_memory_offset":64,"shared_memory_byte_size":8}}]}"#;
        let response = rest::decode_response(&Bytes::from_static(text.as_bytes()), None).unwrap();
        assert_eq!(taken(&response.outputs[0]), Some(8));
        assert!(response.outputs[0].data.is_empty());
    }
}
