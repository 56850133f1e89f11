//! Several requests as one, and its answer as several.
//!
//! In: requests that differ in nothing but their rows (the first dimension of every input) and their id. Out: one request
//! whose rows are theirs one after the other, its data in the pieces that they came in. The other way the answer is cut by
//! rows; the cuts are slices of it.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;

use super::{Datatype, Error, InferRequest, InferResponse, Tensor, grpc, rest};

/// The key of `raw_input_contents` in a `ModelInferRequest`: its number, 7, and that a length follows.
const RAW_INPUT_CONTENTS: u8 = 7 << 3 | 2;

/// Several requests as one.
#[derive(Debug, Clone, PartialEq)]
pub struct Joined {
    /// Names, datatypes, shapes, parameters and outputs, and no data. The id only of one that is alone, since servers name it
    /// in what they say of errors.
    pub head: InferRequest,
    /// The pieces of each input's data, in the order of `head.inputs`.
    pub data: Vec<Vec<Bytes>>,
}

/// Joins requests. `None`: there are none, or they differ in more than their rows.
pub fn join<'a>(requests: impl IntoIterator<Item = &'a InferRequest>) -> Option<Joined> {
    let mut requests = requests.into_iter();
    let first = requests.next()?;
    let mut head = first.clone();
    let mut data: Vec<Vec<Bytes>> =
        head.inputs.iter_mut().map(|input| vec![std::mem::take(&mut input.data)]).collect();
    for request in requests {
        if request.inputs.len() != head.inputs.len() {
            return None;
        }
        head.id = None;
        for (at, input) in head.inputs.iter_mut().enumerate() {
            // Most clients of a model write its inputs in the same order.
            let same = request.inputs.get(at).filter(|other| other.name == input.name);
            let other = same.or_else(|| request.inputs.iter().find(|other| other.name == input.name))?;
            let (rows, rest) = other.shape.split_first()?;
            let (all, own) = input.shape.split_first_mut()?;
            if rest != own || other.datatype != input.datatype {
                return None;
            }
            *all = all.checked_add(*rows)?;
            data[at].push(other.data.clone());
        }
    }
    Some(Joined { head, data })
}

impl Joined {
    /// The body of a REST request, binary, of which nothing was copied.
    pub fn rest(&self) -> Result<rest::Body, Error> {
        rest::encode_scattered(&self.head, &self.data)
    }

    /// The body of a `ModelInfer` call, with its length before it ("Length-Prefixed-Message" of gRPC over HTTP/2), of which
    /// nothing was copied. An empty version lets the server choose.
    ///
    /// A message's fields may come in any order (Protocol Buffers, "Encoding"), so that raw contents can follow all else:
    /// each its key, its length, and then its pieces as they are.
    pub fn grpc_frames(&self, model: &str, version: &str) -> Result<Vec<Bytes>, Error> {
        let mut message = grpc::encode_request(model, version, self.head.clone(), grpc::Contents::Raw)?;
        message.raw_input_contents.clear();
        let sizes = self.data.iter().map(|pieces| pieces.iter().map(Bytes::len).sum::<usize>());
        let raw: usize = sizes.clone().map(|size| 1 + prost::length_delimiter_len(size) + size).sum();
        let length = message.encoded_len() + raw;
        let prefix = u32::try_from(length).map_err(|_| Error::TooLong(length))?;

        let mut head = BytesMut::with_capacity(5 + message.encoded_len() + 11 * self.data.len());
        head.put_u8(0);
        head.put_u32(prefix);
        // A buffer that grows is never full, here and below.
        let _ = message.encode(&mut head);
        let mut frames = Vec::new();
        for (pieces, size) in self.data.iter().zip(sizes) {
            head.put_u8(RAW_INPUT_CONTENTS);
            let _ = prost::encode_length_delimiter(size, &mut head);
            frames.push(head.split().freeze());
            frames.extend(pieces.iter().filter(|piece| !piece.is_empty()).cloned());
        }
        if !head.is_empty() {
            frames.push(head.freeze());
        }
        Ok(frames)
    }

    /// The same as one request. Copies, unless there was only one.
    pub fn whole(self) -> InferRequest {
        let mut request = self.head;
        for (input, pieces) in request.inputs.iter_mut().zip(self.data) {
            input.data = super::whole(pieces);
        }
        request
    }
}

/// An output whose first dimension is not the rows that were asked: the model takes no batches.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the output {output:?} has the shape {shape:?}, where {rows} rows were asked")]
pub struct NotRows {
    /// The output.
    pub output: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What was asked.
    pub rows: u64,
}

/// Cuts an answer into those for so many rows each.
pub fn split(response: &InferResponse, rows: &[u32]) -> Result<Vec<InferResponse>, NotRows> {
    let all: u64 = rows.iter().map(|rows| u64::from(*rows)).sum();
    let head = InferResponse { outputs: Vec::new(), ..response.clone() };
    let mut answers = vec![head; rows.len()];
    for output in &response.outputs {
        let not_rows = || NotRows { output: output.name.clone(), shape: output.shape.clone(), rows: all };
        let (first, own) = output.shape.split_first().ok_or_else(not_rows)?;
        if *first != all {
            return Err(not_rows());
        }
        let ends = ends(output, own, rows).ok_or_else(not_rows)?;
        let mut begin = 0;
        for ((answer, rows), end) in answers.iter_mut().zip(rows).zip(ends) {
            let shape = std::iter::once(u64::from(*rows)).chain(own.iter().copied()).collect();
            let data = output.data.slice(begin..end);
            begin = end;
            answer.outputs.push(Tensor {
                name: output.name.clone(),
                datatype: output.datatype,
                shape,
                parameters: output.parameters.clone(),
                data,
            });
        }
    }
    Ok(answers)
}

/// Where in the data each one's rows end.
fn ends(output: &Tensor, own: &[u64], rows: &[u32]) -> Option<Vec<usize>> {
    let elements = super::elements(own)? as usize;
    let mut ends = Vec::with_capacity(rows.len());
    if output.datatype == Datatype::Bytes {
        let mut lengths = super::strings(&output.data).map(|string| Some(4 + string.ok()?.len()));
        let mut end = 0;
        for rows in rows {
            for _ in 0..*rows as usize * elements {
                end += lengths.next()??;
            }
            ends.push(end);
        }
    } else {
        let row = elements * output.datatype.size()?;
        let mut end = 0;
        for rows in rows {
            end += *rows as usize * row;
            ends.push(end);
        }
    }
    (ends.last().copied().unwrap_or_default() == output.data.len()).then_some(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oip::{Parameters, RequestedOutput};
    use proptest::prelude::*;

    /// A request with an input of numbers and one of strings, of so many rows.
    fn request(rows: u64, seed: u8) -> InferRequest {
        let numbers = (0..rows * 3).map(|at| f32::from(seed) + at as f32);
        let strings: Vec<Vec<u8>> =
            (0..rows).map(|at| vec![seed; (at as usize * 7 + seed as usize) % 5]).collect();
        InferRequest {
            id: Some(seed.to_string()),
            inputs: vec![
                Tensor::fp32("x", vec![rows, 3], numbers),
                Tensor::bytes("s", vec![rows], strings.iter().map(Vec::as_slice)),
            ],
            outputs: vec![RequestedOutput { name: "y".into(), parameters: Parameters::new() }],
            ..InferRequest::default()
        }
    }

    /// What a model would answer that gives back what it gets.
    fn echo(request: InferRequest) -> InferResponse {
        InferResponse { model_name: "echo".into(), outputs: request.inputs, ..InferResponse::default() }
    }

    proptest! {
        #[test]
        fn each_gets_back_its_own_rows(rows in proptest::collection::vec(1u32..5, 1..9)) {
            let requests: Vec<_> = rows.iter().zip(0..).map(|(rows, seed)| request((*rows).into(), seed)).collect();
            let joined = join(&requests).unwrap();
            // Over the wire, as parts that nobody joined.
            let body = joined.rest().unwrap();
            let length = body.header_length;
            let sent = rest::decode_request(&body.into_bytes(), length).unwrap();
            // And over gRPC.
            let frames = joined.grpc_frames("m", "3").unwrap();
            let (sizes, message) = (frames.iter().map(Bytes::len).sum::<usize>(), frames.concat());
            prop_assert_eq!(&message[..5], [&[0][..], &(sizes as u32 - 5).to_be_bytes()].concat());
            let message = grpc::ModelInferRequest::decode(Bytes::from(message).slice(5..)).unwrap();
            prop_assert_eq!((&message.model_name[..], &message.model_version[..]), ("m", "3"));
            prop_assert_eq!(&grpc::decode_request(message).unwrap(), &sent);
            prop_assert_eq!(&sent, &joined.clone().whole());
            // Nothing was copied on the way.
            for piece in joined.data.iter().flatten().filter(|piece| !piece.is_empty()) {
                prop_assert!(frames.iter().any(|frame| frame.as_ptr() == piece.as_ptr()));
            }

            let answer = grpc::encode_response(echo(sent), grpc::Contents::Raw).unwrap();
            let answer = grpc::decode_response(answer).unwrap();
            let body = rest::encode_response(&answer, |_| true).unwrap();
            let length = body.header_length;
            prop_assert_eq!(&rest::decode_response(&body.into_bytes(), length).unwrap(), &answer);
            let answers = split(&answer, &rows).unwrap();
            for (answer, request) in answers.into_iter().zip(requests) {
                prop_assert_eq!(answer.outputs, request.inputs);
            }
        }
    }

    #[test]
    fn inputs_may_come_in_another_order() {
        let (one, mut two) = (request(1, 1), request(2, 2));
        two.inputs.reverse();
        let joined = join([&one, &two]).unwrap().whole();
        assert_eq!(joined.inputs[0].shape, [3, 3]);
        joined.inputs.iter().for_each(|input| input.check().unwrap());
    }

    #[test]
    fn what_differs_in_more_than_rows_is_not_joined() {
        let mut other = request(1, 2);
        other.inputs[0].shape = vec![3, 1];
        assert_eq!(join([&request(1, 1), &other]), None);
        other = request(1, 2);
        other.inputs.pop();
        assert_eq!(join([&request(1, 1), &other]), None);
        assert_eq!(join([]), None);
    }

    #[test]
    fn inputs_without_bytes_and_requests_without_inputs_can_be_sent() {
        let empty =
            InferRequest { inputs: vec![Tensor::fp32("x", vec![1, 0], [])], ..InferRequest::default() };
        for request in [empty, InferRequest::default()] {
            let frames = join([&request]).unwrap().grpc_frames("m", "").unwrap().concat();
            let message = grpc::ModelInferRequest::decode(&frames[5..]).unwrap();
            assert_eq!(message.raw_input_contents.len(), request.inputs.len());
            let read = grpc::decode_request(message).unwrap();
            assert_eq!(read, request);
        }
    }

    #[test]
    fn an_output_without_rows_is_named() {
        let mut response = echo(request(3, 1));
        response.outputs.push(Tensor::fp32("mean", vec![1], [0.5]));
        let error = split(&response, &[1, 2]).unwrap_err();
        assert_eq!(error.output, "mean");
        assert!(error.to_string().contains("3 rows were asked"), "{error}");
        response.outputs = vec![Tensor::fp32("scalar", vec![], [0.5])];
        assert!(split(&response, &[1]).is_err());
    }
}
