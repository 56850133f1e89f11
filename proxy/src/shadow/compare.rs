//! Two answers, held against each other. Pure: what is compared, and when, is [`pair`](super::pair)'s.
//!
//! Answers of the Open Inference Protocol are compared tensor by tensor: datatype and shape are the same, numbers are within a tolerance,
//! strings are equal; and where a tensor has rows of more than one number, whether the greatest of each row is at the same place.
//! Everything else agrees if its status is of the same class and its body the same to the byte.

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderValue, Method, Request};
use penstock_inference::oip::grpc::{self, MODEL_INFER, ModelInferResponse};
use penstock_inference::oip::{self, Datatype, InferResponse, Tensor, rest};
use penstock_kernels::normalise::{f32_of_bf16, f32_of_f16};
use prost::Message as _;

use crate::config::{Compare, Tolerance};
use crate::{answer, report};

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// The Open Inference Protocol over REST.
    Rest,
    /// Its `ModelInfer`.
    Infer,
    /// Another method of gRPC.
    Grpc,
    /// Something else.
    Other,
}

impl Wire {
    /// What a request speaks.
    pub fn of<B>(request: &Request<B>) -> Self {
        let path = request.uri().path();
        if answer::is_grpc(request.headers()) {
            return if path == MODEL_INFER { Self::Infer } else { Self::Grpc };
        }
        let infers = *request.method() == Method::POST && oip::prefix::of_path(path).is_some();
        if infers { Self::Rest } else { Self::Other }
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Its status; 0: none.
    pub status: u16,
    /// Its gRPC status, from headers or trailers.
    pub grpc: Option<HeaderValue>,
    /// How long its JSON is, where binary tensors follow.
    pub header_length: Option<usize>,
    /// Its body.
    pub body: Vec<Bytes>,
}

impl Answer {
    /// Whether it says that the server failed.
    pub fn has_failed(&self) -> bool {
        self.status >= 500 || self.grpc.as_ref().is_some_and(|status| report::is_failure(status.as_bytes()))
    }

    fn is_ok(&self) -> bool {
        self.status / 100 == 2 && self.grpc.as_ref().is_none_or(|status| status == "0")
    }
}

/// The gRPC status among headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get("grpc-status").cloned()
}

/// What came of a comparison. The default: they do not agree, and nothing more can be said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// They are the same, as far as the tolerance goes.
    pub agrees: bool,
    /// Whether the greatest elements of all rows are at the same places; `None`: there are none, or no such rows.
    pub same_top: Option<bool>,
    /// The largest `|a - b|` of two numbers that has an end; 0: there is none.
    pub largest_difference: f64,
}

/// Holds a copy's answer against the client's. `None`: it cannot be done, the messages are compressed.
pub fn compare(wire: Wire, copy: &Answer, client: &Answer, rules: &Compare) -> Option<Verdict> {
    if copy.status / 100 != client.status / 100 || copy.grpc != client.grpc {
        return Some(Verdict::default());
    }
    let bodies = [copy, client].map(|answer| oip::whole(answer.body.clone()));
    if matches!(wire, Wire::Infer | Wire::Grpc) && bodies.iter().any(|body| body.first() == Some(&1)) {
        return None;
    }
    let [of_copy, of_client] = &bodies;
    let read = match wire {
        Wire::Rest if client.is_ok() => (
            rest::decode_response(of_copy, copy.header_length).ok(),
            rest::decode_response(of_client, client.header_length).ok(),
        ),
        Wire::Infer if client.is_ok() => (message(of_copy), message(of_client)),
        _ => (None, None),
    };
    Some(match read {
        (Some(copy), Some(client)) => tensors(&copy, &client, rules),
        _ => Verdict { agrees: of_copy == of_client, ..Verdict::default() },
    })
}

/// The one message of an answer (gRPC over HTTP/2, "Length-Prefixed-Message").
fn message(body: &Bytes) -> Option<InferResponse> {
    let mut body = body.clone();
    let flags = body.try_get_u8().ok()?;
    let length = body.try_get_u32().ok()?;
    if flags != 0 || body.len() as u64 != u64::from(length) {
        return None;
    }
    grpc::decode_response(ModelInferResponse::decode(body).ok()?).ok()
}

fn tensors(copy: &InferResponse, client: &InferResponse, rules: &Compare) -> Verdict {
    let named = |response: &InferResponse| -> Vec<String> {
        response.outputs.iter().map(|output| output.name.clone()).collect()
    };
    let mut names = match rules.outputs.is_empty() {
        true => [named(copy), named(client)].concat(),
        false => rules.outputs.clone(),
    };
    names.sort_unstable();
    names.dedup();
    fn output<'a>(response: &'a InferResponse, name: &str) -> Option<&'a Tensor> {
        response.outputs.iter().find(|output| output.name == name)
    }
    let mut verdict = Verdict { agrees: true, ..Verdict::default() };
    let (mut ranked, mut same_top, mut unranked) = (false, true, false);
    for name in &names {
        let (Some(copy), Some(client)) = (output(copy, name), output(client, name)) else {
            (verdict.agrees, unranked) = (false, true);
            continue;
        };
        let held = tensor(copy, client, rules.tolerance);
        verdict.agrees &= held.agrees;
        verdict.largest_difference = verdict.largest_difference.max(held.largest_difference);
        match held.top {
            Top::None => {}
            Top::Unknown => unranked = true,
            Top::Known { same } => {
                ranked = true;
                same_top &= same;
            }
        }
    }
    verdict.same_top = (ranked && !unranked).then_some(same_top);
    verdict
}

/// What is known of the greatest elements of a tensor's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Top {
    /// It has no rows of several numbers.
    None,
    /// One of the two has a row without any number, or they have different shapes.
    Unknown,
    /// All rows of both have one.
    Known { same: bool },
}

#[derive(Debug)]
struct Held {
    agrees: bool,
    top: Top,
    largest_difference: f64,
}

fn tensor(copy: &Tensor, client: &Tensor, tolerance: Tolerance) -> Held {
    if copy.datatype != client.datatype || copy.shape != client.shape {
        return Held { agrees: false, top: Top::Unknown, largest_difference: 0.0 };
    }
    let row = row(client);
    let (a, b): (&[u8], &[u8]) = (&copy.data, &client.data);
    macro_rules! number {
        ($bytes:literal, $read:expr) => {
            numbers::<$bytes, _>(a, b, row, tolerance, $read)
        };
    }
    match client.datatype {
        Datatype::Bytes => Held { agrees: a == b, top: Top::None, largest_difference: 0.0 },
        Datatype::Bool | Datatype::Uint8 => number!(1, |[le]| i128::from(le)),
        Datatype::Int8 => number!(1, |le| i128::from(i8::from_le_bytes(le))),
        Datatype::Uint16 => number!(2, |le| i128::from(u16::from_le_bytes(le))),
        Datatype::Int16 => number!(2, |le| i128::from(i16::from_le_bytes(le))),
        Datatype::Uint32 => number!(4, |le| i128::from(u32::from_le_bytes(le))),
        Datatype::Int32 => number!(4, |le| i128::from(i32::from_le_bytes(le))),
        Datatype::Uint64 => number!(8, |le| i128::from(u64::from_le_bytes(le))),
        Datatype::Int64 => number!(8, |le| i128::from(i64::from_le_bytes(le))),
        Datatype::Fp16 => number!(2, |le| f64::from(f32_of_f16(u16::from_le_bytes(le)))),
        Datatype::Bf16 => number!(2, |le| f64::from(f32_of_bf16(u16::from_le_bytes(le)))),
        Datatype::Fp32 => number!(4, |le| f64::from(f32::from_le_bytes(le))),
        Datatype::Fp64 => number!(8, f64::from_le_bytes),
    }
}

/// How many numbers a row has, where it has several: what lies under one index of the first dimension.
fn row(tensor: &Tensor) -> Option<usize> {
    let numeric = !matches!(tensor.datatype, Datatype::Bool | Datatype::Bytes);
    let (rows, of_row) = tensor.shape.split_first()?;
    let length = oip::elements(of_row).and_then(|length| usize::try_from(length).ok())?;
    (numeric && *rows > 0 && length >= 2).then_some(length)
}

/// A number of a tensor.
trait Number: Copy + PartialOrd {
    /// Whether it is none.
    fn is_nan(self) -> bool;
    /// `|a - b|`.
    fn apart(self, other: Self) -> f64;
    /// `|a|`.
    fn size(self) -> f64;
}

impl Number for f64 {
    fn is_nan(self) -> bool {
        Self::is_nan(self)
    }

    fn apart(self, other: Self) -> f64 {
        (self - other).abs()
    }

    fn size(self) -> f64 {
        self.abs()
    }
}

/// Of integers: a difference is taken before it is rounded.
impl Number for i128 {
    fn is_nan(self) -> bool {
        false
    }

    fn apart(self, other: Self) -> f64 {
        (self - other).unsigned_abs() as f64
    }

    fn size(self) -> f64 {
        self.unsigned_abs() as f64
    }
}

fn numbers<const BYTES: usize, N: Number>(
    copy: &[u8],
    client: &[u8],
    row: Option<usize>,
    tolerance: Tolerance,
    read: impl Fn([u8; BYTES]) -> N,
) -> Held {
    let (copy, client) = (copy.as_chunks::<BYTES>().0, client.as_chunks::<BYTES>().0);
    let mut held = Held { agrees: copy.len() == client.len(), top: Top::None, largest_difference: 0.0 };
    for (a, b) in copy.iter().zip(client) {
        let (a, b) = (read(*a), read(*b));
        // Infinities are equal too, and have no difference.
        if a == b || (a.is_nan() && b.is_nan()) {
            continue;
        }
        let apart = a.apart(b);
        if apart.is_finite() {
            held.largest_difference = held.largest_difference.max(apart);
        }
        held.agrees &= apart.is_finite() && apart <= tolerance.absolute + tolerance.relative * b.size();
    }
    if let Some(row) = row {
        held.top = Top::Known { same: true };
        for (a, b) in copy.chunks(row).zip(client.chunks(row)) {
            match (top(a, &read), top(b, &read)) {
                (Some(a), Some(b)) if a == b => {}
                (Some(_), Some(_)) => held.top = Top::Known { same: false },
                _ => {
                    held.top = Top::Unknown;
                    break;
                }
            }
        }
    }
    held
}

/// The place of the greatest, the first of several that are.
fn top<const BYTES: usize, N: Number>(
    row: &[[u8; BYTES]],
    read: &impl Fn([u8; BYTES]) -> N,
) -> Option<usize> {
    let mut greatest: Option<(usize, N)> = None;
    for (at, le) in row.iter().enumerate() {
        let number = read(*le);
        if !number.is_nan() && greatest.is_none_or(|(_, greatest)| number > greatest) {
            greatest = Some((at, number));
        }
    }
    greatest.map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_inference::oip::Parameters;

    fn rules(absolute: f64, relative: f64) -> Compare {
        let tolerance = Tolerance { absolute, relative };
        Compare { tolerance, outputs: Vec::new(), max_bytes: 1 << 20 }
    }

    fn response(outputs: Vec<Tensor>) -> InferResponse {
        InferResponse { model_name: "m".into(), outputs, ..InferResponse::default() }
    }

    fn raw(name: &str, datatype: Datatype, shape: &[u64], data: Vec<u8>) -> Tensor {
        let parameters = Parameters::new();
        Tensor { name: name.into(), datatype, shape: shape.to_vec(), parameters, data: data.into() }
    }

    fn fp32(values: &[f32]) -> Vec<Tensor> {
        vec![Tensor::fp32("y", vec![1, values.len() as u64], values.iter().copied())]
    }

    fn held(copy: Vec<Tensor>, client: Vec<Tensor>, rules: &Compare) -> Verdict {
        tensors(&response(copy), &response(client), rules)
    }

    /// The copy's numbers, the client's, the tolerance, and what is to come of it.
    type Case<'a> = (&'a [f32], &'a [f32], f64, f64, bool, Option<bool>, f64);

    #[test]
    fn numbers_agree_within_the_tolerance_of_the_clients() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        // copy, client, absolute, relative, agrees, same top, largest difference
        let table: &[Case<'_>] = &[
            (&[1.0, 2.0], &[1.0, 2.0], 0.0, 0.0, true, Some(true), 0.0),
            (&[1.0, 2.0], &[1.0, 2.5], 0.5, 0.0, true, Some(true), 0.5),
            (&[1.0, 2.0], &[1.0, 2.5], 0.49, 0.0, false, Some(true), 0.5),
            (&[1.0, 8.0], &[1.0, 10.0], 0.0, 0.2, true, Some(true), 2.0),
            // Of the client's number, not of the copy's.
            (&[1.0, 10.0], &[1.0, 8.0], 0.0, 0.2, false, Some(true), 2.0),
            (&[2.0, 1.0], &[1.0, 2.0], 5.0, 0.0, true, Some(false), 1.0),
            (&[nan, 1.0], &[nan, 1.0], 0.0, 0.0, true, Some(true), 0.0),
            (&[nan, 1.0], &[0.0, 1.0], 9.0, 9.0, false, Some(true), 0.0),
            (&[inf, 1.0], &[inf, 1.0], 0.0, 0.0, true, Some(true), 0.0),
            (&[1.0, 1.0], &[inf, 1.0], 9.0, 9.0, false, Some(true), 0.0),
            (&[-inf, 1.0], &[inf, 1.0], 9.0, 9.0, false, Some(false), 0.0),
            (&[nan, nan], &[nan, nan], 0.0, 0.0, true, None, 0.0),
            (&[3.0], &[4.0], 1.0, 0.0, true, None, 1.0),
            (&[], &[], 0.0, 0.0, true, None, 0.0),
        ];
        for (copy, client, absolute, relative, agrees, same_top, largest_difference) in table {
            let verdict = held(fp32(copy), fp32(client), &rules(*absolute, *relative));
            let (agrees, same_top, largest_difference) = (*agrees, *same_top, *largest_difference);
            assert_eq!(
                verdict,
                Verdict { agrees, same_top, largest_difference },
                "{copy:?} against {client:?}"
            );
        }
    }

    #[test]
    fn every_datatype_is_read_as_what_it_is() {
        // One number above the other by one step, and how far apart that is.
        let table: &[(Datatype, Vec<u8>, Vec<u8>, f64)] = &[
            (Datatype::Bool, vec![0], vec![1], 1.0),
            (Datatype::Uint8, vec![255], vec![254], 1.0),
            (Datatype::Int8, vec![255], vec![0], 1.0),
            (Datatype::Uint16, vec![0, 1], vec![255, 0], 1.0),
            (Datatype::Int16, (-300_i16).to_le_bytes().into(), (-299_i16).to_le_bytes().into(), 1.0),
            (Datatype::Uint32, u32::MAX.to_le_bytes().into(), (u32::MAX - 1).to_le_bytes().into(), 1.0),
            (Datatype::Int32, i32::MIN.to_le_bytes().into(), (i32::MIN + 1).to_le_bytes().into(), 1.0),
            // A double cannot tell these apart.
            (Datatype::Uint64, u64::MAX.to_le_bytes().into(), (u64::MAX - 1).to_le_bytes().into(), 1.0),
            (Datatype::Int64, i64::MIN.to_le_bytes().into(), (i64::MIN + 1).to_le_bytes().into(), 1.0),
            (Datatype::Fp16, 0x3c00_u16.to_le_bytes().into(), 0x4000_u16.to_le_bytes().into(), 1.0),
            (Datatype::Bf16, 0x3f80_u16.to_le_bytes().into(), 0x4000_u16.to_le_bytes().into(), 1.0),
            (Datatype::Fp32, 1.5_f32.to_le_bytes().into(), 1.25_f32.to_le_bytes().into(), 0.25),
            (Datatype::Fp64, 1.5_f64.to_le_bytes().into(), 1.25_f64.to_le_bytes().into(), 0.25),
        ];
        for (datatype, copy, client, apart) in table {
            let of = |data: &Vec<u8>| vec![raw("y", *datatype, &[1], data.clone())];
            let verdict = held(of(copy), of(client), &rules(0.0, 0.0));
            assert_eq!(verdict, Verdict { largest_difference: *apart, ..Verdict::default() }, "{datatype}");
            assert!(held(of(copy), of(client), &rules(*apart, 0.0)).agrees, "{datatype}");
            assert!(held(of(copy), of(copy), &rules(0.0, 0.0)).agrees, "{datatype}");
        }
    }

    #[test]
    fn each_row_has_a_greatest_and_labels_and_strings_have_none() {
        let rows = |values: &[i64]| {
            let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            vec![raw("y", Datatype::Int64, &[2, values.len() as u64 / 2], data)]
        };
        let top = |copy: &[i64], client: &[i64]| held(rows(copy), rows(client), &rules(1e9, 0.0)).same_top;
        assert_eq!(top(&[1, 2, 9, 8], &[5, 6, 2, 1]), Some(true));
        assert_eq!(top(&[1, 2, 9, 8], &[5, 6, 1, 2]), Some(false));
        assert_eq!(top(&[5, 5, 1, 1], &[7, 7, 2, 2]), Some(true), "the first of equals");
        assert_eq!(top(&[1, 2], &[2, 1]), None, "rows of one number");
        let strings = |text: &[u8]| vec![Tensor::bytes("s", vec![1, 2], [text, b"x"])];
        assert_eq!(
            held(strings(b"a"), strings(b"a"), &rules(0.0, 0.0)),
            Verdict { agrees: true, ..Verdict::default() }
        );
        assert_eq!(held(strings(b"a"), strings(b"b"), &rules(9.0, 9.0)), Verdict::default());
    }

    #[test]
    fn what_one_does_not_have_or_has_in_another_shape_does_not_agree() {
        let (one, two) = (fp32(&[1.0, 2.0]), vec![Tensor::fp32("z", vec![1], [1.0])]);
        let both = [one.clone(), two.clone()].concat();
        let turned: Vec<_> = both.iter().rev().cloned().collect();
        let exact = rules(0.0, 0.0);
        assert!(held(both.clone(), turned, &exact).agrees, "their order says nothing");
        assert_eq!(held(both.clone(), one.clone(), &exact), Verdict::default());
        assert_eq!(held(one.clone(), both.clone(), &exact), Verdict::default());
        let named = |name: &str| Compare { outputs: vec![name.into()], ..rules(0.0, 0.0) };
        assert!(held(both.clone(), one.clone(), &named("y")).agrees);
        assert!(!held(both.clone(), one.clone(), &named("z")).agrees);
        assert!(!held(both.clone(), both, &named("w")).agrees, "what nobody has is not the same");
        let flat = vec![Tensor::fp32("y", vec![2], [1.0, 2.0])];
        assert!(!held(flat, one.clone(), &exact).agrees);
        let doubles = vec![raw("y", Datatype::Fp64, &[1, 2], vec![0; 16])];
        assert!(!held(doubles, one, &rules(9.0, 9.0)).agrees);
    }

    fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
        Answer { status, body: vec![body.into()], ..Answer::default() }
    }

    #[test]
    fn over_each_wire_tensors_are_found_wherever_they_lie() {
        let near = rules(0.1, 0.0);
        let [copy, client] = [fp32(&[1.0, 2.0]), fp32(&[1.05, 2.0])].map(response);
        let answer_of = |response: &InferResponse, binary: bool| {
            let body = rest::encode_response(response, |_| binary).unwrap();
            Answer { status: 200, header_length: body.header_length, body: body.parts, ..Answer::default() }
        };
        // One of them as JSON and the other binary: that is the server's choice, and no difference.
        for (first, second) in [(false, false), (true, true), (true, false)] {
            let (copy, client) = (answer_of(&copy, first), answer_of(&client, second));
            let verdict = compare(Wire::Rest, &copy, &client, &near).unwrap();
            assert!(verdict.agrees && verdict.same_top == Some(true), "{verdict:?}");
            assert!(!compare(Wire::Rest, &copy, &client, &rules(0.0, 0.0)).unwrap().agrees);
        }
        let call = |response: &InferResponse, contents| {
            let message = grpc::encode_response(response.clone(), contents).unwrap().encode_to_vec();
            let frame = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
            Answer { grpc: Some(HeaderValue::from_static("0")), ..self::answer(200, frame) }
        };
        let (copy, client) = (call(&copy, grpc::Contents::Raw), call(&client, grpc::Contents::Typed));
        assert!(compare(Wire::Infer, &copy, &client, &near).unwrap().agrees);
        assert!(
            !compare(Wire::Grpc, &copy, &client, &near).unwrap().agrees,
            "another method is compared by bytes"
        );
        let packed = Answer { body: vec![Bytes::from_static(&[1, 0, 0, 0, 0])], ..client.clone() };
        assert_eq!(compare(Wire::Infer, &copy, &packed, &near), None);
        let refused = Answer { grpc: Some(HeaderValue::from_static("3")), ..client.clone() };
        assert!(!compare(Wire::Infer, &copy, &refused, &near).unwrap().agrees);
    }

    #[test]
    fn anything_else_agrees_to_the_byte_and_by_the_class_of_its_status() {
        let exact = rules(0.0, 0.0);
        let table = [
            (answer(200, "a"), answer(200, "a"), true),
            (answer(200, "a"), answer(200, "b"), false),
            (answer(200, "a"), answer(201, "a"), true),
            (answer(200, "a"), answer(404, "a"), false),
            (answer(404, "{\"error\": 1}"), answer(404, "{\"error\": 1}"), true),
        ];
        for wire in [Wire::Rest, Wire::Other] {
            for (copy, client, agrees) in &table {
                let verdict = compare(wire, copy, client, &exact).unwrap();
                assert_eq!(
                    verdict,
                    Verdict { agrees: *agrees, ..Verdict::default() },
                    "{copy:?}, {client:?}"
                );
            }
        }
        let pieces =
            Answer { body: vec![Bytes::from_static(b"a"), Bytes::from_static(b"b")], ..answer(200, "") };
        assert!(compare(Wire::Other, &pieces, &answer(200, "ab"), &exact).unwrap().agrees);
    }

    #[test]
    fn what_a_server_says_of_itself_is_a_failure_in_both_protocols() {
        let grpc =
            |status: &'static str| Answer { grpc: Some(HeaderValue::from_static(status)), ..answer(200, "") };
        for (answer, failed) in
            [(answer(500, ""), true), (answer(404, ""), false), (grpc("13"), true), (grpc("3"), false)]
        {
            assert_eq!(answer.has_failed(), failed, "{answer:?}");
        }
    }
}
