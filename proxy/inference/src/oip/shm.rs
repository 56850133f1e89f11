//! Tensors in system shared memory (Triton's "system shared memory extension"): the message says where they lie, and the
//! server reads and writes them there.
//!
//! In: where inputs lie and where outputs are to go, in a region that the server was told of once ([`register`]; over gRPC
//! [`REGISTER`]). Out: a request that carries no data ([`request_over_shm`]), and data for what a response says of its outputs
//! ([`rest::decode_placed`](super::rest::decode_placed), [`grpc::decode_placed`](super::grpc::decode_placed)). Can go wrong: a
//! place is smaller than its output, which the server refuses, and which is looked at again when it is read.
//!
//! As Triton 2.51 answers: an output in shared memory has a datatype and a shape but neither data nor parameters, and over
//! gRPC empty raw contents, so that only who asked knows where it lies. An output with `binary_data` beside a region is
//! refused. Inputs with data and inputs in a region mix; raw contents are then for the former alone. A name that is
//! registered twice is refused; one that is unregistered twice is not. The server reads and writes the region for as long as
//! a request runs, which is until it has answered, whether anybody waits for that or not.

use base64::Engine as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Datatype, InferRequest, Parameter, Parameters, Problem, RequestedOutput, elements};

/// The parameter that names the region.
pub const REGION: &str = "shared_memory_region";
/// The parameter that says where in it a tensor begins.
pub const OFFSET: &str = "shared_memory_offset";
/// The parameter that says how many bytes it has there.
pub const SIZE: &str = "shared_memory_byte_size";
/// What a REST client says of the form of an output; not to be said of one that goes elsewhere.
const BINARY_DATA: &str = "binary_data";

/// The path of the gRPC call that tells of a region: `SystemSharedMemoryRegisterRequest`.
pub const REGISTER: &str = "/inference.GRPCInferenceService/SystemSharedMemoryRegister";
/// The path of the gRPC call that takes it back: `SystemSharedMemoryUnregisterRequest`.
pub const UNREGISTER: &str = "/inference.GRPCInferenceService/SystemSharedMemoryUnregister";
/// The path of the gRPC call that asks what there is: `SystemSharedMemoryStatusRequest`.
pub const STATUS: &str = "/inference.GRPCInferenceService/SystemSharedMemoryStatus";

/// Where bytes lie in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// From the beginning of the region.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A region that a server knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// Its name at the server.
    pub name: String,
    /// The shared memory object, as `shm_open` names it: a slash, and no other.
    pub key: String,
    /// Where in the object it begins; a multiple of a page.
    #[serde(default)]
    pub offset: u64,
    /// How long it is.
    pub byte_size: u64,
}

/// A region of a GPU's memory that a server knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredCuda {
    /// Its name at the server.
    pub name: String,
}

/// Path and body of the REST request (`POST`) that registers the shared memory object `key` from its beginning.
pub fn register(region: &str, key: &str, bytes: u64) -> (String, Bytes) {
    let body = serde_json::json!({"key": key, "offset": 0, "byte_size": bytes});
    (format!("/v2/systemsharedmemory/region/{region}/register"), body.to_string().into())
}

/// The path of the REST request (`POST`, without a body) that takes a region back.
pub fn unregister(region: &str) -> String {
    format!("/v2/systemsharedmemory/region/{region}/unregister")
}

/// Path and body of the REST request (`POST`) that registers memory of a GPU, whole: the extension `cuda_shared_memory`. The
/// handle is what CUDA's `cuIpcGetMemHandle` wrote; its name is one of the same space as those of system shared memory.
pub fn register_cuda(region: &str, handle: &[u8; 64], device: u32, bytes: u64) -> (String, Bytes) {
    let b64 = base64::engine::general_purpose::STANDARD.encode(handle);
    let body = serde_json::json!({"raw_handle": {"b64": b64}, "device_id": device, "byte_size": bytes});
    (format!("/v2/cudasharedmemory/region/{region}/register"), body.to_string().into())
}

/// The path of the REST request (`POST`, without a body) that takes it back.
pub fn unregister_cuda(region: &str) -> String {
    format!("/v2/cudasharedmemory/region/{region}/unregister")
}

/// The path of the REST request (`GET`) that asks which regions of GPUs there are; the answer is a list of [`RegisteredCuda`].
pub fn status_cuda() -> &'static str {
    "/v2/cudasharedmemory/status"
}

/// The path of the REST request (`GET`) that asks which regions there are; the answer is a list of [`Registered`].
pub fn status() -> &'static str {
    "/v2/systemsharedmemory/status"
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

/// The same request with its tensors in a region: inputs in their order, and those outputs that are to go there. Where all
/// outputs are wanted (`head.outputs` is empty) these must be all, since the server answers with what is named. Data that the
/// head has is left out.
pub fn request_over_shm<'a>(
    mut head: InferRequest,
    region: &str,
    inputs: impl IntoIterator<Item = Span>,
    outputs: impl IntoIterator<Item = (&'a str, Span)>,
) -> InferRequest {
    for (input, span) in head.inputs.iter_mut().zip(inputs) {
        input.parameters.extend(place(region, span));
        input.data = Bytes::new();
    }
    for (name, span) in outputs {
        let wanted = match head.outputs.iter().position(|wanted| wanted.name == name) {
            Some(at) => &mut head.outputs[at],
            None => head.outputs.push_mut(RequestedOutput { name: name.to_owned(), ..Default::default() }),
        };
        wanted.parameters.remove(BINARY_DATA);
        wanted.parameters.extend(place(region, span));
    }
    head
}

/// Nothing was placed anywhere.
pub(super) fn nowhere(_: &str) -> Option<Bytes> {
    None
}

/// Removes what only says where a tensor lies.
pub(super) fn forget(parameters: &mut Parameters) {
    for name in [REGION, OFFSET, SIZE] {
        parameters.remove(name);
    }
}

/// The data of a tensor at the beginning of its place, which may be longer.
pub(super) fn lying(datatype: Datatype, shape: &[u64], place: &Bytes) -> Result<Bytes, Problem> {
    let count = elements(shape).unwrap_or(u64::MAX);
    let found = place.len() as u64;
    let Some(size) = datatype.size() else {
        let mut end = 0;
        let strings = super::strings(place).take(usize::try_from(count).unwrap_or(usize::MAX));
        for string in strings {
            end += 4 + string?.len();
        }
        return Ok(place.slice(..end));
    };
    let expected = count.saturating_mul(size as u64);
    if expected > found {
        return Err(Problem::ByteCount { datatype, shape: shape.to_vec(), expected, found });
    }
    Ok(place.slice(..expected as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oip::{Tensor, grpc, rest};
    use prost::Message as _;

    const AT: Span = Span { offset: 64, bytes: 16 };

    #[test]
    fn a_region_is_registered_as_triton_wants_it() {
        let (path, body) = register("arena", "/penstock-1", 4096);
        assert_eq!(path, "/v2/systemsharedmemory/region/arena/register");
        assert_eq!(body, r#"{"byte_size":4096,"key":"/penstock-1","offset":0}"#);
        assert_eq!(unregister("arena"), "/v2/systemsharedmemory/region/arena/unregister");
        // What Triton 2.51 answered.
        let listed = r#"[{"name":"arena","key":"/penstock-1","offset":0,"byte_size":4096}]"#;
        let listed: Vec<Registered> = serde_json::from_str(listed).unwrap();
        assert_eq!((&listed[0].key[..], listed[0].byte_size), ("/penstock-1", 4096));
        // And over gRPC, as protobuf writes it by the numbers of Triton's grpc_service.proto.
        let message = grpc::SystemSharedMemoryRegisterRequest {
            name: "a".into(),
            key: "/k".into(),
            offset: 0,
            byte_size: 4096,
        };
        assert_eq!(message.encode_to_vec(), b"\x0a\x01a\x12\x02/k\x20\x80\x20");
    }

    #[test]
    fn memory_of_a_gpu_is_registered_as_triton_wants_it() {
        let (path, body) = register_cuda("gpu", &[7; 64], 1, 4096);
        assert_eq!(path, "/v2/cudasharedmemory/region/gpu/register");
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["device_id"], &body["byte_size"]), (&1.into(), &4096.into()));
        // 64 bytes in base64: 84 letters and two for the last byte.
        let handle = body["raw_handle"]["b64"].as_str().unwrap();
        assert!(handle.len() == 88 && handle.starts_with("BwcHBwcH") && handle.ends_with("Bw=="), "{handle}");
        assert_eq!(unregister_cuda("gpu"), "/v2/cudasharedmemory/region/gpu/unregister");
    }

    fn request() -> InferRequest {
        let head = InferRequest {
            inputs: vec![
                Tensor::fp32("x", vec![2, 2], [1.0, 2.0, 3.0, 4.0]),
                Tensor::fp32("z", vec![2], [5.0, 6.0]),
            ],
            outputs: vec![
                RequestedOutput {
                    name: "y".into(),
                    parameters: [(BINARY_DATA.to_owned(), Parameter::Bool(true))].into(),
                },
                RequestedOutput { name: "other".into(), parameters: Parameters::new() },
            ],
            ..InferRequest::default()
        };
        request_over_shm(head, "arena", [AT], [("y", AT), ("more", Span { offset: 0, bytes: 8 })])
    }

    #[test]
    fn a_tensor_in_shared_memory_has_no_data_in_the_message() {
        let body = rest::encode_request(&request(), true).unwrap();
        let header = body.header_length.unwrap();
        let body = body.into_bytes();
        assert_eq!(body.len(), header + 8, "what is not in shared memory follows");
        let there = r#""parameters":{"shared_memory_byte_size":16,"shared_memory_offset":64,"shared_memory_region":"arena"}"#;
        let text = String::from_utf8(body[..header].to_vec()).unwrap();
        assert_eq!(
            text,
            format!(
                r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[2,2],{there}}},{{"name":"z","datatype":"FP32","shape":[2],"parameters":{{"binary_data_size":8}}}}],"outputs":[{{"name":"y",{there}}},{{"name":"other"}},{{"name":"more","parameters":{{"shared_memory_byte_size":8,"shared_memory_region":"arena"}}}}]}}"#
            )
        );
        // What a client says of shared memory is not ours to read.
        assert!(rest::decode_request(&body, Some(header)).is_err());
    }

    #[test]
    fn over_grpc_raw_contents_are_of_those_that_have_data() {
        for contents in [grpc::Contents::Raw, grpc::Contents::Typed] {
            let message = grpc::encode_request("m", "", request(), contents).unwrap();
            assert_eq!(message.inputs[0].contents, None);
            assert_eq!(message.raw_input_contents.len(), usize::from(contents == grpc::Contents::Raw));
            assert!(message.inputs[0].parameters.contains_key(REGION));
            assert!(grpc::decode_request(message).is_err());
        }
    }

    /// An output that lies in shared memory, and one that does not, as Triton 2.51 answers.
    const ANSWER: &str = r#"{"model_name":"m","model_version":"1","outputs":[
        {"name":"y","datatype":"FP32","shape":[2]},{"name":"s","datatype":"BYTES","shape":[2,1]},
        {"name":"total","datatype":"INT64","shape":[2,1],"data":[3,7]}]}"#;

    fn placed(output: &str) -> Option<Bytes> {
        match output {
            "y" => Some(Bytes::from_static(&[0, 0, 128, 63, 0, 0, 0, 64, 9, 9])),
            "s" => Some(Bytes::from_static(b"\x02\0\0\0ab\0\0\0\0\xff\xff\xff\xff")),
            _ => None,
        }
    }

    #[test]
    fn an_output_in_shared_memory_is_found_there() {
        let body = Bytes::from_static(ANSWER.as_bytes());
        let response = rest::decode_placed(&body, None, placed).unwrap();
        let expected = [
            Tensor::fp32("y", vec![2], [1.0, 2.0]),
            Tensor::bytes("s", vec![2, 1], [&b"ab"[..], b""]),
            Tensor {
                name: "total".into(),
                datatype: Datatype::Int64,
                shape: vec![2, 1],
                parameters: Parameters::new(),
                data: Bytes::from_static(&[3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]),
            },
        ];
        assert_eq!(response.outputs, expected);

        let mut message = grpc::encode_response(response.clone(), grpc::Contents::Raw).unwrap();
        message.raw_output_contents[..2].fill(Bytes::new());
        assert_eq!(grpc::decode_placed(message.clone(), placed), Ok(response));
        assert!(grpc::decode_response(message).is_err());
    }

    #[test]
    fn a_place_that_is_too_small_is_told() {
        let told = |answer: &'static str, place: &'static [u8]| {
            let answer = Bytes::from_static(answer.as_bytes());
            rest::decode_placed(&answer, None, |_| Some(Bytes::from_static(place))).unwrap_err().to_string()
        };
        assert_eq!(
            told(r#"{"outputs":[{"name":"y","datatype":"FP32","shape":[2]}]}"#, &[0; 7]),
            "output \"y\": FP32 of shape [2] has 8 bytes, but the data has 7"
        );
        let told = told(r#"{"outputs":[{"name":"y","datatype":"BYTES","shape":[2]}]}"#, &[0, 0, 0, 0, 1]);
        assert!(told.starts_with("output \"y\""), "{told}");
    }
}
