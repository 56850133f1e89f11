//! Several requests as one, and its answer as several.
//!
//! In: requests that differ in nothing but their rows (the first dimension of every input) and their id. Out: one request
//! whose rows are theirs one after the other, its data in the pieces that they came in. The other way the answer is cut by
//! rows; the cuts are slices of it.

use bytes::{Bytes, BytesMut};

use super::{Datatype, Error, InferRequest, InferResponse, Tensor, rest};

/// Several requests as one.
#[derive(Debug, Clone, PartialEq)]
pub struct Joined {
    /// Names, datatypes, shapes, parameters and outputs; no id, and no data.
    pub head: InferRequest,
    /// The pieces of each input's data, in the order of `head.inputs`.
    pub data: Vec<Vec<Bytes>>,
}

/// Joins requests. `None`: there are none, or they differ in more than their rows.
pub fn join<'a>(requests: impl IntoIterator<Item = &'a InferRequest>) -> Option<Joined> {
    let mut requests = requests.into_iter();
    let first = requests.next()?;
    let mut head = InferRequest { id: None, ..first.clone() };
    let mut data: Vec<Vec<Bytes>> =
        head.inputs.iter_mut().map(|input| vec![std::mem::take(&mut input.data)]).collect();
    for request in requests {
        if request.inputs.len() != head.inputs.len() {
            return None;
        }
        for (at, input) in head.inputs.iter_mut().enumerate() {
            // Most clients of a model write its inputs in the same order.
            let same = request.inputs.get(at).filter(|other| other.name == input.name);
            let other = same.or_else(|| request.inputs.iter().find(|other| other.name == input.name))?;
            let (rows, rest) = other.shape.split_first()?;
            let (all, own) = input.shape.split_first_mut()?;
            if rest != own || other.datatype != input.datatype {
                return None;
            }
            *all += rows;
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

    /// The same as one request. Copies, unless there was only one.
    pub fn whole(self) -> InferRequest {
        let mut request = self.head;
        for (input, mut pieces) in request.inputs.iter_mut().zip(self.data) {
            input.data = if pieces.len() == 1 {
                pieces.remove(0)
            } else {
                let mut joined = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
                pieces.iter().for_each(|piece| joined.extend_from_slice(piece));
                joined.freeze()
            };
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
            prop_assert_eq!(&sent, &joined.whole());
            let answers = split(&echo(sent), &rows).unwrap();
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
