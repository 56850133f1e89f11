//! The protocol over gRPC: messages, client and server stubs, and the way between messages and [`InferRequest`] and
//! [`InferResponse`].
//!
//! Tensors are read from raw contents (moved) or typed contents (copied), and written as raw ones unless typed ones are
//! asked for. Model name and version stay in the message: take them before it is decoded.

use super::{
    Datatype, Error, InferRequest, InferResponse, MAX_TENSORS, ModelMetadata, Parameter, Parameters, Problem,
    RequestedOutput, Side, Tensor, TensorMetadata, shm, shm::nowhere, strings, tensor,
};
use bytes::{BufMut, Bytes, BytesMut};
use std::collections::BTreeMap;

/// The messages, as the compiler wrote them.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod pb {
    tonic::include_proto!("inference");
}

pub use pb::grpc_inference_service_client::GrpcInferenceServiceClient as Client;
pub use pb::grpc_inference_service_server::{
    GrpcInferenceService as Service, GrpcInferenceServiceServer as Server,
};
pub use pb::{
    ModelConfigRequest, ModelConfigResponse, ModelMetadataRequest, ModelMetadataResponse,
    RepositoryIndexRequest, RepositoryIndexResponse, ServerMetadataRequest, ServerMetadataResponse,
};
pub use pb::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
pub use pb::{
    SystemSharedMemoryRegisterRequest, SystemSharedMemoryRegisterResponse, SystemSharedMemoryStatusRequest,
    SystemSharedMemoryStatusResponse, SystemSharedMemoryUnregisterRequest,
    SystemSharedMemoryUnregisterResponse,
};

use pb::infer_parameter::ParameterChoice;
use pb::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use pb::model_infer_response::InferOutputTensor;
use pb::{InferParameter, InferTensorContents};

/// The path of the one inference call that has one answer.
pub const MODEL_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// What the server is.
pub const SERVER_METADATA: &str = "/inference.GRPCInferenceService/ServerMetadata";
/// What a model takes and gives.
pub const MODEL_METADATA: &str = "/inference.GRPCInferenceService/ModelMetadata";
/// How a model is configured (Triton).
pub const MODEL_CONFIG: &str = "/inference.GRPCInferenceService/ModelConfig";
/// Which models and versions there are, and in which states (Triton, MLServer).
pub const REPOSITORY_INDEX: &str = "/inference.GRPCInferenceService/RepositoryIndex";

/// How a message carries tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// As little-endian bytes behind the message. Any datatype, no conversion.
    Raw,
    /// As lists of numbers inside each tensor. Not for FP16 and BF16.
    Typed,
}

/// Reads a request; model name and version are not looked at.
pub fn decode_request(message: ModelInferRequest) -> Result<InferRequest, Error> {
    let wire = message.inputs.into_iter();
    let wire = wire.map(|t| (t.name, t.datatype, t.shape, t.parameters, t.contents)).collect();
    let inputs = tensors(wire, Side::Input, message.raw_input_contents, nowhere)?;
    let outputs = message.outputs.into_iter().map(|output| {
        Ok(RequestedOutput { name: output.name, parameters: parameters_in(output.parameters)? })
    });
    Ok(InferRequest {
        id: Some(message.id).filter(|id| !id.is_empty()),
        parameters: parameters_in(message.parameters)?,
        inputs,
        outputs: outputs.collect::<Result<_, Error>>()?,
    })
}

/// Reads a response.
pub fn decode_response(message: ModelInferResponse) -> Result<InferResponse, Error> {
    decode_placed(message, nowhere)
}

/// Reads a response of which the server has put outputs into shared memory: where, says `placed` of an output's name.
pub fn decode_placed(
    message: ModelInferResponse,
    placed: impl Fn(&str) -> Option<Bytes>,
) -> Result<InferResponse, Error> {
    let wire = message.outputs.into_iter();
    let wire = wire.map(|t| (t.name, t.datatype, t.shape, t.parameters, t.contents)).collect();
    Ok(InferResponse {
        model_name: message.model_name,
        model_version: message.model_version,
        id: Some(message.id).filter(|id| !id.is_empty()),
        parameters: parameters_in(message.parameters)?,
        outputs: tensors(wire, Side::Output, message.raw_output_contents, placed)?,
    })
}

/// Writes a request for a model; an empty version lets the server choose.
pub fn encode_request(
    model: &str,
    version: &str,
    request: InferRequest,
    contents: Contents,
) -> Result<ModelInferRequest, Error> {
    let mut raw = Vec::new();
    let inputs = request.inputs.into_iter().map(|input| {
        let contents = contents_out(&input, Side::Input, contents, &mut raw)?;
        Ok(InferInputTensor {
            name: input.name,
            datatype: input.datatype.name().to_owned(),
            shape: tensor::wire_shape(&input.shape),
            parameters: parameters_out(input.parameters),
            contents,
        })
    });
    let inputs = inputs.collect::<Result<_, Error>>()?;
    let outputs = request.outputs.into_iter().map(|output| InferRequestedOutputTensor {
        name: output.name,
        parameters: parameters_out(output.parameters),
    });
    Ok(ModelInferRequest {
        model_name: model.to_owned(),
        model_version: version.to_owned(),
        id: request.id.unwrap_or_default(),
        parameters: parameters_out(request.parameters),
        inputs,
        outputs: outputs.collect(),
        raw_input_contents: raw,
    })
}

/// Writes a response.
pub fn encode_response(response: InferResponse, contents: Contents) -> Result<ModelInferResponse, Error> {
    let mut raw = Vec::new();
    let outputs = response.outputs.into_iter().map(|output| {
        let contents = contents_out(&output, Side::Output, contents, &mut raw)?;
        Ok(InferOutputTensor {
            name: output.name,
            datatype: output.datatype.name().to_owned(),
            shape: tensor::wire_shape(&output.shape),
            parameters: parameters_out(output.parameters),
            contents,
        })
    });
    let outputs = outputs.collect::<Result<_, Error>>()?;
    Ok(ModelInferResponse {
        model_name: response.model_name,
        model_version: response.model_version,
        id: response.id.unwrap_or_default(),
        parameters: parameters_out(response.parameters),
        outputs,
        raw_output_contents: raw,
    })
}

impl From<ModelMetadata> for pb::ModelMetadataResponse {
    fn from(model: ModelMetadata) -> Self {
        let tensors = |list: Vec<TensorMetadata>| {
            let wire = list.into_iter().map(|tensor| pb::model_metadata_response::TensorMetadata {
                name: tensor.name,
                datatype: tensor.datatype.name().to_owned(),
                shape: tensor.shape,
            });
            wire.collect()
        };
        Self {
            name: model.name,
            versions: model.versions,
            platform: model.platform,
            inputs: tensors(model.inputs),
            outputs: tensors(model.outputs),
        }
    }
}

impl TryFrom<pb::ModelMetadataResponse> for ModelMetadata {
    type Error = Problem;

    fn try_from(model: pb::ModelMetadataResponse) -> Result<Self, Problem> {
        let tensors = |list: Vec<pb::model_metadata_response::TensorMetadata>| {
            let read = list.into_iter().map(|tensor| {
                let datatype = tensor.datatype.parse()?;
                Ok(TensorMetadata { name: tensor.name, datatype, shape: tensor.shape })
            });
            read.collect::<Result<Vec<_>, Problem>>()
        };
        Ok(Self {
            name: model.name,
            versions: model.versions,
            platform: model.platform,
            inputs: tensors(model.inputs)?,
            outputs: tensors(model.outputs)?,
        })
    }
}

type WireParameters = BTreeMap<String, InferParameter>;

fn parameters_in(wire: WireParameters) -> Result<Parameters, Error> {
    let parameters = wire.into_iter().map(|(name, parameter)| {
        let value = match parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
            Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
            Some(ParameterChoice::Uint64Param(value)) => {
                i64::try_from(value).map_or(Parameter::Uint(value), Parameter::Int)
            }
            Some(ParameterChoice::DoubleParam(value)) => Parameter::Double(value),
            Some(ParameterChoice::StringParam(value)) => Parameter::String(value),
            None => return Err(Error::EmptyParameter(name)),
        };
        Ok((name, value))
    });
    parameters.collect()
}

fn parameters_out(parameters: Parameters) -> WireParameters {
    let wire = parameters.into_iter().map(|(name, value)| {
        let choice = match value {
            Parameter::Bool(value) => ParameterChoice::BoolParam(value),
            Parameter::Int(value) => ParameterChoice::Int64Param(value),
            Parameter::Uint(value) => ParameterChoice::Uint64Param(value),
            Parameter::Double(value) => ParameterChoice::DoubleParam(value),
            Parameter::String(value) => ParameterChoice::StringParam(value),
        };
        (name, InferParameter { parameter_choice: Some(choice) })
    });
    wire.collect()
}

type WireTensor = (String, String, Vec<i64>, WireParameters, Option<InferTensorContents>);

/// Gives each tensor its data: its raw contents, or what its typed contents say, or what lies where it was to be placed
/// if it has neither. Raw contents of such a one are there, and empty.
fn tensors(
    wire: Vec<WireTensor>,
    side: Side,
    raw: Vec<Bytes>,
    placed: impl Fn(&str) -> Option<Bytes>,
) -> Result<Vec<Tensor>, Error> {
    if wire.len() > MAX_TENSORS {
        return Err(Error::TooManyTensors(wire.len()));
    }
    if !raw.is_empty() && raw.len() != wire.len() {
        return Err(Error::RawCount { raw: raw.len(), tensors: wire.len() });
    }
    let mut raw = raw.into_iter();
    let mut tensors = Vec::with_capacity(wire.len());
    for (name, datatype, shape, parameters, contents) in wire {
        let parameters = parameters_in(parameters)?;
        let read = || {
            let datatype: Datatype = datatype.parse()?;
            let shape = tensor::shape(&shape)?;
            let contents = contents.filter(|contents| *contents != InferTensorContents::default());
            let raw = raw.next();
            let place = if contents.is_none() && raw.as_ref().is_none_or(Bytes::is_empty) {
                placed(&name)
            } else {
                None
            };
            let has_data = contents.is_some() || raw.as_ref().is_some_and(|raw| !raw.is_empty());
            if place.is_none() && parameters.contains_key(shm::REGION) {
                return Err(if has_data { Problem::DataAndPlace } else { Problem::NoData });
            }
            let data = match (raw, contents) {
                _ if let Some(place) = place => shm::lying(datatype, &shape, &place)?,
                (Some(data), None) => data,
                (Some(_), Some(_)) => return Err(Problem::Contents(datatype)),
                (None, contents) => typed_in(datatype, &shape, contents.unwrap_or_default())?,
            };
            let tensor = Tensor { name: name.clone(), datatype, shape, parameters, data };
            tensor.check()?;
            Ok(tensor)
        };
        let read: Result<Tensor, Problem> = read();
        tensors.push(read.map_err(|problem| Error::Tensor { side, name, problem })?);
    }
    Ok(tensors)
}

fn typed_in(datatype: Datatype, shape: &[u64], contents: InferTensorContents) -> Result<Bytes, Problem> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = &contents;
    let found = match datatype {
        Datatype::Bool => bool_contents.len(),
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => int_contents.len(),
        Datatype::Int64 => int64_contents.len(),
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => uint_contents.len(),
        Datatype::Uint64 => uint64_contents.len(),
        Datatype::Fp32 => fp32_contents.len(),
        Datatype::Fp64 => fp64_contents.len(),
        Datatype::Bytes => bytes_contents.len(),
        Datatype::Fp16 | Datatype::Bf16 => return Err(Problem::BinaryOnly(datatype)),
    };
    let all = bool_contents.len()
        + int_contents.len()
        + int64_contents.len()
        + uint_contents.len()
        + uint64_contents.len()
        + fp32_contents.len()
        + fp64_contents.len()
        + bytes_contents.len();
    if all != found {
        return Err(Problem::Contents(datatype));
    }
    let expected = tensor::elements(shape).unwrap_or(u64::MAX);
    if found as u64 != expected {
        return Err(Problem::ElementCount { shape: shape.to_vec(), expected, found: found as u64 });
    }
    let mut out = BytesMut::with_capacity(found * datatype.size().unwrap_or(4));
    match datatype {
        Datatype::Bool => bool_contents.iter().for_each(|value| out.put_u8((*value).into())),
        Datatype::Int8 => narrow(int_contents, datatype, |value: i8| out.put_i8(value))?,
        Datatype::Int16 => narrow(int_contents, datatype, |value: i16| out.put_i16_le(value))?,
        Datatype::Int32 => int_contents.iter().for_each(|value| out.put_i32_le(*value)),
        Datatype::Int64 => int64_contents.iter().for_each(|value| out.put_i64_le(*value)),
        Datatype::Uint8 => narrow(uint_contents, datatype, |value: u8| out.put_u8(value))?,
        Datatype::Uint16 => narrow(uint_contents, datatype, |value: u16| out.put_u16_le(value))?,
        Datatype::Uint32 => uint_contents.iter().for_each(|value| out.put_u32_le(*value)),
        Datatype::Uint64 => uint64_contents.iter().for_each(|value| out.put_u64_le(*value)),
        Datatype::Fp32 => fp32_contents.iter().for_each(|value| out.put_f32_le(*value)),
        Datatype::Fp64 => fp64_contents.iter().for_each(|value| out.put_f64_le(*value)),
        Datatype::Bytes => bytes_contents.iter().for_each(|value| {
            out.put_u32_le(value.len() as u32);
            out.put_slice(value);
        }),
        Datatype::Fp16 | Datatype::Bf16 => {}
    }
    Ok(out.freeze())
}

/// The wire's integers have at least 32 bits; the tensor's may have fewer.
fn narrow<W, N>(values: &[W], datatype: Datatype, mut put: impl FnMut(N)) -> Result<(), Problem>
where
    W: Copy + std::fmt::Display,
    N: TryFrom<W>,
{
    for (index, value) in (0..).zip(values) {
        let narrowed = N::try_from(*value);
        put(narrowed.map_err(|_| Problem::Element { index, found: value.to_string(), datatype })?);
    }
    Ok(())
}

/// Moves the data to the raw contents, or turns it into typed ones.
fn contents_out(
    tensor: &Tensor,
    side: Side,
    contents: Contents,
    raw: &mut Vec<Bytes>,
) -> Result<Option<InferTensorContents>, Error> {
    match contents {
        _ if tensor.in_shared_memory() => Ok(None),
        Contents::Raw => {
            raw.push(tensor.data.clone());
            Ok(None)
        }
        Contents::Typed => match typed_out(tensor) {
            Ok(contents) => Ok(Some(contents)),
            Err(problem) => Err(Error::Tensor { side, name: tensor.name.clone(), problem }),
        },
    }
}

fn typed_out(tensor: &Tensor) -> Result<InferTensorContents, Problem> {
    fn list<const N: usize, T>(data: &[u8], from_le: impl Fn([u8; N]) -> T) -> Vec<T> {
        data.as_chunks::<N>().0.iter().map(|le| from_le(*le)).collect()
    }
    let data = &tensor.data;
    let mut contents = InferTensorContents::default();
    match tensor.datatype {
        Datatype::Bool => contents.bool_contents = data.iter().map(|byte| *byte != 0).collect(),
        Datatype::Int8 => contents.int_contents = list(data, |le| i8::from_le_bytes(le).into()),
        Datatype::Int16 => contents.int_contents = list(data, |le| i16::from_le_bytes(le).into()),
        Datatype::Int32 => contents.int_contents = list(data, i32::from_le_bytes),
        Datatype::Int64 => contents.int64_contents = list(data, i64::from_le_bytes),
        Datatype::Uint8 => contents.uint_contents = list(data, |le| u8::from_le_bytes(le).into()),
        Datatype::Uint16 => contents.uint_contents = list(data, |le| u16::from_le_bytes(le).into()),
        Datatype::Uint32 => contents.uint_contents = list(data, u32::from_le_bytes),
        Datatype::Uint64 => contents.uint64_contents = list(data, u64::from_le_bytes),
        Datatype::Fp32 => contents.fp32_contents = list(data, f32::from_le_bytes),
        Datatype::Fp64 => contents.fp64_contents = list(data, f64::from_le_bytes),
        Datatype::Bytes => {
            let strings = strings(data).map(|string| string.map(|bytes| data.slice_ref(bytes)));
            contents.bytes_contents = strings.collect::<Result<_, _>>()?;
        }
        Datatype::Fp16 | Datatype::Bf16 => return Err(Problem::BinaryOnly(tensor.datatype)),
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    fn tensor(datatype: Datatype, data: &[u8]) -> Tensor {
        let count = datatype.size().map_or(2, |size| data.len() / size) as u64;
        Tensor {
            name: format!("of {datatype}"),
            datatype,
            shape: vec![count],
            parameters: [("p".to_owned(), Parameter::Double(0.5))].into(),
            data: Bytes::copy_from_slice(data),
        }
    }

    fn every_datatype() -> InferRequest {
        let inputs = Datatype::ALL.map(|datatype| match datatype {
            Datatype::Bool => tensor(datatype, &[0, 1, 1, 0]),
            Datatype::Bytes => tensor(datatype, &[1, 0, 0, 0, 255, 0, 0, 0, 0]),
            _ => tensor(datatype, &[1, 2, 3, 4, 5, 6, 7, 8, 255, 254, 253, 252, 251, 250, 249, 64]),
        });
        InferRequest {
            id: Some("id".into()),
            parameters: [("big".to_owned(), Parameter::Uint(u64::MAX))].into(),
            inputs: inputs.into(),
            outputs: vec![RequestedOutput::default()],
        }
    }

    #[test]
    fn raw_and_typed_are_the_same_request() {
        let request = every_datatype();
        let raw = encode_request("m", "1", request.clone(), Contents::Raw).unwrap();
        let raw = ModelInferRequest::decode(Bytes::from(raw.encode_to_vec())).unwrap();
        assert_eq!((raw.model_name.as_str(), raw.model_version.as_str()), ("m", "1"));
        assert_eq!(decode_request(raw), Ok(request.clone()));

        let typed = encode_request("m", "1", request.clone(), Contents::Typed).unwrap_err();
        assert_eq!(
            typed,
            Error::Tensor {
                side: Side::Input,
                name: "of FP16".into(),
                problem: Problem::BinaryOnly(Datatype::Fp16),
            }
        );
        let mut request = request;
        request.inputs.retain(|input| !matches!(input.datatype, Datatype::Fp16 | Datatype::Bf16));
        let typed = encode_request("m", "1", request.clone(), Contents::Typed).unwrap();
        assert!(typed.raw_input_contents.is_empty());
        assert_eq!(decode_request(typed), Ok(request));
    }

    #[test]
    fn a_raw_tensor_is_a_slice_of_the_message() {
        let message = encode_request("m", "", every_datatype(), Contents::Raw).unwrap();
        let wire = Bytes::from(message.encode_to_vec());
        let read = decode_request(ModelInferRequest::decode(wire.clone()).unwrap()).unwrap();
        assert!(wire.as_ptr_range().contains(&read.inputs[0].data.as_ptr()));
    }

    #[test]
    fn responses_survive_the_way() {
        let response = InferResponse {
            model_name: "m".into(),
            model_version: "2".into(),
            id: None,
            parameters: Parameters::new(),
            outputs: vec![Tensor::fp32("y", vec![1, 2], [1.0, f32::INFINITY])],
        };
        for contents in [Contents::Raw, Contents::Typed] {
            let message = encode_response(response.clone(), contents).unwrap();
            assert_eq!(decode_response(message), Ok(response.clone()));
        }
    }

    #[test]
    fn contents_that_do_not_fit_are_named() {
        let input = |datatype: &str, contents| InferInputTensor {
            name: "x".into(),
            datatype: datatype.into(),
            shape: vec![1],
            contents: Some(contents),
            ..Default::default()
        };
        let sentence = |input, raw: Vec<Bytes>| {
            let message =
                ModelInferRequest { inputs: vec![input], raw_input_contents: raw, ..Default::default() };
            decode_request(message).unwrap_err().to_string()
        };
        let fp32 = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
        let ints = InferTensorContents { int_contents: vec![300], ..Default::default() };
        let none = InferTensorContents::default();
        for (input, raw, expected) in [
            (
                input("INT8", ints.clone()),
                vec![],
                r#"input "x": element 0 of the data is 300, which is not INT8"#,
            ),
            (
                input("INT32", fp32.clone()),
                vec![],
                r#"input "x": the contents are not in the list of INT32 alone"#,
            ),
            (
                input("FP32", none.clone()),
                vec![],
                r#"input "x": shape [1] has 1 elements, but the data has 0"#,
            ),
            (
                input("FP32", none),
                vec![Bytes::from_static(&[0; 3])],
                r#"input "x": FP32 of shape [1] has 4 bytes, but the data has 3"#,
            ),
            (
                input("FP32", fp32),
                vec![Bytes::from_static(&[0; 4])],
                r#"input "x": the contents are not in the list of FP32 alone"#,
            ),
            (
                input("INT32", ints),
                vec![Bytes::new(), Bytes::new()],
                "there are 2 raw contents for 1 tensors; there must be one for each, or none",
            ),
        ] {
            assert_eq!(sentence(input, raw), expected);
        }
        let message = ModelInferRequest {
            parameters: [("p".to_owned(), InferParameter { parameter_choice: None })].into(),
            ..Default::default()
        };
        assert_eq!(decode_request(message), Err(Error::EmptyParameter("p".into())));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>(), typed in any::<bool>()) {
            let mut request = every_datatype();
            request.inputs.retain(|input| !matches!(input.datatype, Datatype::Fp16 | Datatype::Bf16));
            let contents = if typed { Contents::Typed } else { Contents::Raw };
            let mut wire = encode_request("m", "", request, contents).unwrap().encode_to_vec();
            let at = at.index(wire.len());
            wire[at] = byte;
            if let Ok(Ok(request)) = ModelInferRequest::decode(&wire[..]).map(decode_request) {
                prop_assert!(request.inputs.iter().all(|input| input.check().is_ok()));
            }
        }
    }
}
