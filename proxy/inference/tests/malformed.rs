//! Requests that were sound once: cut, bent, spliced, with lengths that lie and shapes that nothing can hold. Each is
//! either read as something sound, or refused in the protocol's own terms: an error that names the tensor and the reason,
//! in one sentence, and never a panic.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use bytes::Bytes;
use penstock_inference::oip::grpc::{self, Contents, ModelInferRequest, pb};
use penstock_inference::oip::{Datatype, Error, InferRequest, Parameter, Parameters, Tensor, prefix, rest};
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message as _;
use serde_json::{Value, json};

/// The longest sentence: in gRPC it is a header, and it stands in logs.
const LONGEST: usize = 2048;

fn tensor() -> impl Strategy<Value = Tensor> {
    let datatype = prop::sample::select(&Datatype::ALL[..]);
    (datatype, 0u64..5, 0u64..4, "[a-z]{1,8}", any::<u8>()).prop_map(
        |(datatype, rows, columns, name, seed)| {
            let elements = (rows * columns) as usize;
            let data: Vec<u8> = match datatype {
                Datatype::Bytes => (0..elements).flat_map(|_| [2, 0, 0, 0, b'a', seed & 0x7f]).collect(),
                Datatype::Bool => (0..elements).map(|at| (at % 2) as u8).collect(),
                // No NaN, so that JSON holds it.
                other => vec![seed & 0x3f; elements * other.size().unwrap_or_default()],
            };
            let parameters = Parameters::from([("p".to_owned(), Parameter::Int(seed.into()))]);
            Tensor { name, datatype, shape: vec![rows, columns], parameters, data: data.into() }
        },
    )
}

fn request() -> impl Strategy<Value = InferRequest> {
    let inputs = prop::collection::vec(tensor(), 1..4);
    (inputs, prop::option::of("[a-z]{1,8}")).prop_map(|(inputs, id)| InferRequest {
        id,
        inputs,
        ..InferRequest::default()
    })
}

/// What is done to bytes.
#[derive(Debug, Clone)]
enum Change {
    Cut(Index),
    Flip(Index, u8),
    Drop(Index, u8),
    Insert(Index, Vec<u8>),
    /// A piece of the message stands where another stood.
    Splice(Index, Index, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let words = prop::sample::select(vec![
        &b"\xff"[..],
        b"NaN",
        b"Infinity",
        b"-1",
        b"1e999",
        b"18446744073709551616",
        b"\"",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"null",
        b"\\ud800",
        b"\0",
    ]);
    prop_oneof![
        any::<Index>().prop_map(Change::Cut),
        (any::<Index>(), 1u8..).prop_map(|(at, mask)| Change::Flip(at, mask)),
        (any::<Index>(), 1u8..20).prop_map(|(at, count)| Change::Drop(at, count)),
        (any::<Index>(), words).prop_map(|(at, word)| Change::Insert(at, word.to_vec())),
        (any::<Index>(), any::<Index>(), 1u8..40)
            .prop_map(|(from, to, count)| Change::Splice(from, to, count)),
    ]
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        let span = |at: &Index, count: u8| {
            let begin = at.index(length);
            begin..(begin + usize::from(count)).min(length)
        };
        match self {
            Self::Cut(at) => bytes.truncate(at.index(length)),
            Self::Flip(at, mask) => bytes[at.index(length)] ^= mask,
            Self::Drop(at, count) => drop(bytes.drain(span(at, *count))),
            Self::Insert(at, word) => drop(bytes.splice(at.index(length)..at.index(length), word.clone())),
            Self::Splice(from, to, count) => {
                let piece = bytes[span(from, *count)].to_vec();
                bytes.splice(span(to, *count), piece);
            }
        }
    }
}

/// Sound, or refused in a sentence that says of which tensor it speaks, if it speaks of one.
fn is_sound_or_says_why(read: Result<InferRequest, Error>) -> Result<(), TestCaseError> {
    match read {
        Ok(request) => {
            for input in &request.inputs {
                prop_assert_eq!(input.check(), Ok(()));
            }
        }
        Err(error) => {
            let sentence = error.to_string();
            prop_assert!(sentence.len() <= LONGEST, "{} bytes: {:.300}", sentence.len(), sentence);
            if let Error::Tensor { name, problem, .. } = &error {
                let begin: String = name.chars().take(20).collect();
                let named = format!("input {begin:?}");
                prop_assert!(sentence.starts_with(named.trim_end_matches('"')), "{}", sentence);
                prop_assert!(sentence.ends_with(&problem.to_string()), "{}", sentence);
            }
        }
    }
    Ok(())
}

fn over_grpc(bytes: &[u8]) -> Option<Result<InferRequest, Error>> {
    let message = ModelInferRequest::decode(Bytes::copy_from_slice(bytes)).ok()?;
    Some(grpc::decode_request(message))
}

fn over_rest(body: impl Into<Vec<u8>>, header: Option<usize>) -> Result<InferRequest, Error> {
    rest::decode_request(&Bytes::from(body.into()), header)
}

fn sentence(body: &Value) -> String {
    over_rest(body.to_string(), None).unwrap_err().to_string()
}

proptest! {
    #[test]
    fn bent_rest_bodies_are_sound_or_refused(
        request in request(),
        changes in prop::collection::vec(change(), 1..4),
        binary in any::<bool>(),
        lie in prop::option::of(any::<Index>()),
    ) {
        // Half-precision numbers travel as bytes alone.
        let Ok(body) = rest::encode_request(&request, binary) else { return Ok(()) };
        let header = body.header_length;
        let mut bytes = body.into_bytes().to_vec();
        changes.iter().for_each(|change| change.apply(&mut bytes));
        let header = lie.map_or(header, |lie| Some(lie.index(bytes.len() * 2 + 2)));
        for ask in [prefix::rest("/v2/models/m/infer", header, &bytes), prefix::grpc(&bytes)].into_iter().flatten() {
            prop_assert!((1..=prefix::MAX_ROWS).contains(&ask.rows));
        }
        is_sound_or_says_why(over_rest(bytes, header))?;
    }

    #[test]
    fn bent_grpc_messages_are_sound_or_refused(
        request in request(),
        changes in prop::collection::vec(change(), 1..4),
        typed in any::<bool>(),
    ) {
        let contents = if typed { Contents::Typed } else { Contents::Raw };
        let Ok(message) = grpc::encode_request("m", "", request, contents) else { return Ok(()) };
        let mut bytes = message.encode_to_vec();
        changes.iter().for_each(|change| change.apply(&mut bytes));
        if let Some(read) = over_grpc(&bytes) {
            is_sound_or_says_why(read)?;
        }
    }

    #[test]
    fn a_body_that_was_cut_is_refused_wherever_it_was_cut(request in request(), cut in any::<Index>()) {
        let body = rest::encode_request(&request, true).unwrap();
        let header = body.header_length;
        let bytes = body.into_bytes();
        let cut = cut.index(bytes.len());
        let error = over_rest(&bytes[..cut], header).unwrap_err();
        if cut < header.unwrap() {
            prop_assert_eq!(error, Error::HeaderTooLong { header: header.unwrap(), body: cut });
        } else {
            prop_assert!(matches!(error, Error::Tensor { .. }), "{}", error);
            let sentence = error.to_string();
            prop_assert!(sentence.contains("bytes of the body are left"), "{}", sentence);
        }
    }

    #[test]
    fn a_shape_that_asks_for_other_than_there_is_is_refused(
        request in request(),
        which in any::<Index>(),
        shape in prop::collection::vec(prop_oneof![0i64..6, Just(i64::MAX), Just(-1), Just(1 << 60)], 0..20),
    ) {
        for contents in [Contents::Raw, Contents::Typed] {
            let Ok(mut message) = grpc::encode_request("m", "", request.clone(), contents) else { continue };
            let at = which.index(message.inputs.len());
            message.inputs[at].shape = shape.clone();
            let read = grpc::decode_request(message);
            let elements = shape.iter().try_fold(1u64, |all, next| all.checked_mul(u64::try_from(*next).ok()?));
            let had = request.inputs[at].shape.iter().product::<u64>();
            let fits = shape.len() <= 16 && elements == Some(had);
            prop_assert_eq!(read.is_ok(), fits, "{:?}", read);
            is_sound_or_says_why(read)?;
        }
    }

    #[test]
    fn a_tensor_that_says_a_wrong_length_is_refused(request in request(), which in any::<Index>(), said in any::<i64>()) {
        let body = rest::encode_request(&request, true).unwrap();
        let length = body.header_length.unwrap();
        let bytes = body.into_bytes();
        let mut header: Value = serde_json::from_slice(&bytes[..length]).unwrap();
        let at = which.index(request.inputs.len());
        let size = &mut header["inputs"][at]["parameters"]["binary_data_size"];
        prop_assume!(size.as_i64() != Some(said));
        *size = said.into();
        let header = header.to_string();
        let error = over_rest([header.as_bytes(), &bytes[length..]].concat(), Some(header.len())).unwrap_err();
        prop_assert!(matches!(error, Error::Tensor { .. } | Error::Unclaimed(_)), "{}", error);
        is_sound_or_says_why(Err(error))?;
    }
}

fn one(shape: Value, data: Value) -> Value {
    json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": data}]})
}

#[test]
fn a_shape_that_claims_what_nothing_can_hold_takes_no_memory() {
    let claims = 1u64 << 60;
    assert_eq!(
        sentence(&one(json!([claims]), json!([1]))),
        "input \"x\": shape [1152921504606846976] has 1152921504606846976 elements, but the data has 1"
    );
    for shape in [json!([claims, claims]), json!([i64::MAX, 3]), json!(vec![1; 17])] {
        let sentence = sentence(&one(shape, json!([1])));
        assert!(sentence.contains("has more elements than can be counted, or more than 16"), "{sentence}");
    }
    // Zero times anything is nothing, but only if it is not the product of what cannot be counted.
    assert!(over_rest(one(json!([0, i64::MAX, i64::MAX]), json!([])).to_string(), None).is_ok());
    assert!(over_rest(one(json!([i64::MAX, i64::MAX, 0]), json!([])).to_string(), None).is_err());
    let strings = json!({"inputs": [{"name": "s", "datatype": "BYTES", "shape": [claims],
        "parameters": {"binary_data_size": 4}}]});
    let strings = strings.to_string();
    let error = over_rest([strings.as_bytes(), &[255; 4]].concat(), Some(strings.len())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "input \"s\": element 0 of the BYTES data says it has 4294967295 bytes, but only 0 are left"
    );
}

#[test]
fn numbers_that_are_none_are_named() {
    for (element, found) in [("NaN", "NaN"), ("1e39", "1e39"), ("\"NaN\"", "\"NaN\""), ("null", "null")] {
        let body =
            format!(r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1],"data":[{element}]}}]}}"#);
        let sentence = over_rest(body, None).unwrap_err().to_string();
        if element == "NaN" {
            assert!(sentence.starts_with("the JSON does not parse as an inference message"), "{sentence}");
        } else {
            assert_eq!(sentence, format!("input \"x\": element 0 of the data is {found}, which is not FP32"));
        }
    }
    // As bytes and over gRPC they are numbers like others.
    let nan =
        InferRequest { inputs: vec![Tensor::fp32("x", vec![1], [f32::NAN])], ..InferRequest::default() };
    for contents in [Contents::Raw, Contents::Typed] {
        let message = grpc::encode_request("m", "", nan.clone(), contents).unwrap();
        assert_eq!(grpc::decode_request(message).unwrap().inputs[0].data, nan.inputs[0].data);
    }
    let long = format!("[{}]", "9".repeat(100_000));
    let body = format!(r#"{{"inputs":[{{"name":"x","datatype":"FP64","shape":[1],"data":{long}}}]}}"#);
    let sentence = over_rest(body, None).unwrap_err().to_string();
    assert!(sentence.len() < 200 && sentence.ends_with("…, which is not FP64"), "{sentence}");
}

#[test]
fn nesting_without_end_ends() {
    for depth in [17, 100, 1_000, 1_000_000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(depth), close.repeat(depth));
            let body =
                format!(r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1],"data":{deep}}}]}}"#);
            let sentence = over_rest(body, None).unwrap_err().to_string();
            assert!(sentence.len() <= LONGEST, "{depth}");
            let open = format!(r#"{{"inputs":{}"#, open.repeat(depth));
            assert!(over_rest(open.clone(), None).is_err());
            assert_eq!(prefix::rest("/v2/models/m/infer", None, open.as_bytes()).unwrap().rows, 1);
        }
    }
}

#[test]
fn a_sentence_is_not_as_long_as_what_it_speaks_of() {
    let long = "x".repeat(1 << 20);
    let of = |body: Value| over_rest(body.to_string(), None).unwrap_err();
    let input = |name: &str, datatype: &str, shape: Value| json!({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": ["a"]}]});
    for body in [
        input(&long, "FP32", json!([1])),
        input("x", &long, json!([1])),
        input("x", "FP32", json!(long)),
        input("x", "FP32", json!(vec![-1; 100_000])),
        input("x", "FP32", json!(vec![1; 100_000])),
        json!({"inputs": long}),
        json!({"id": {"a": long}, "inputs": []}),
        json!({"parameters": {"a": [long]}, "inputs": []}),
    ] {
        let error = of(body);
        assert!(error.to_string().len() <= LONGEST, "{:.300}", error.to_string());
    }
    let message = ModelInferRequest {
        parameters: [(long, pb::InferParameter { parameter_choice: None })].into(),
        ..ModelInferRequest::default()
    };
    assert!(grpc::decode_request(message).unwrap_err().to_string().len() <= LONGEST);
}

#[test]
fn what_says_two_things_is_refused() {
    let refused = |body: &str, part: &str| {
        let sentence = over_rest(body, None).unwrap_err().to_string();
        assert!(sentence.contains(part), "{sentence}");
    };
    let input = r#""datatype":"FP32","shape":[1]"#;
    refused(
        &format!(r#"{{"inputs":[{{"name":"x",{input},"data":[1],"data":[2]}}]}}"#),
        "duplicate field `data`",
    );
    refused(
        &format!(r#"{{"inputs":[{{"name":"x",{input},{input},"data":[1]}}]}}"#),
        "duplicate field `datatype`",
    );
    refused(r#"{"inputs":[],"inputs":[]}"#, "duplicate field `inputs`");
    refused(
        &format!(r#"{{"inputs":[{{"name":"x",{input},"data":[1],"parameters":{{"binary_data_size":4}}}}]}}"#),
        "input \"x\": there are both",
    );
    refused(
        &format!(
            r#"{{"inputs":[{{"name":"x",{input},"data":[1],"parameters":{{"shared_memory_region":"r"}}}}]}}"#
        ),
        "input \"x\": there are both",
    );
    refused(&format!(r#"{{"inputs":[{{"name":"x",{input}}}]}}"#), "input \"x\": there is no data");
    let twice = r#"{"name":"x","datatype":"FP32","shape":[1],"data":[1]}"#;
    // Two inputs of one name are for the model to refuse; they do not travel with others (penstock-coalesce).
    assert_eq!(over_rest(format!(r#"{{"inputs":[{twice},{twice}]}}"#), None).unwrap().inputs.len(), 2);
}

#[test]
fn text_that_is_no_text_is_refused() {
    let body = b"{\"inputs\":[{\"name\":\"\xff\xfe\",\"datatype\":\"FP32\",\"shape\":[1],\"data\":[1]}]}";
    let sentence = over_rest(&body[..], None).unwrap_err().to_string();
    assert!(sentence.starts_with("the JSON does not parse as an inference message"), "{sentence}");
    let strings = r#"{"inputs":[{"name":"s","datatype":"BYTES","shape":[1],"data":["\ud800"]}]}"#;
    let sentence = over_rest(strings, None).unwrap_err().to_string();
    assert!(sentence.contains("\"s\"") || sentence.contains("surrogate"), "{sentence}");
    // Strings of a binary tensor are bytes, and an answer in JSON says which of them it cannot hold.
    let bytes = InferRequest {
        inputs: vec![Tensor::bytes("s", vec![2], [&b"a"[..], b"\xff"])],
        ..InferRequest::default()
    };
    let error = rest::encode_request(&bytes, false).unwrap_err().to_string();
    assert_eq!(error, "input \"s\": element 1 of the BYTES data is not UTF-8; ask for it as binary data");
}

#[test]
fn more_tensors_than_are_read_are_counted() {
    let input = json!({"name": "x", "datatype": "FP32", "shape": [0], "data": []});
    let body = json!({"inputs": vec![input; 257]});
    assert_eq!(sentence(&body), "the message has 257 tensors, and at most 256 are read");
}

proptest! {
    #[test]
    fn numbers_of_parameters_survive_the_way(value in any::<f64>().prop_filter("JSON", |value| value.is_finite())) {
        let parameters = Parameters::from([("d".to_owned(), Parameter::Double(value))]);
        let request = InferRequest { parameters, ..InferRequest::default() };
        let body = rest::encode_request(&request, false).unwrap().into_bytes();
        prop_assert_eq!(rest::decode_request(&body, None).unwrap(), request);
    }
}
