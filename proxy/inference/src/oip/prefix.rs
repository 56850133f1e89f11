//! What an inference request asks for, read out of the beginning of its body: model, version, and how many rows, which
//! are its units of work.
//!
//! In: the path, and the first bytes of the body. Out: an [`Ask`], as far as was seen. The body is not held back and not
//! judged; what is wrong with it, the server says.
//!
//! A request does not say whether its first dimension is a batch. It is taken for one when all inputs that were seen
//! have the same (Triton asks for that where a model batches); otherwise the request is one row.

use crate::scan::{Scan, Visit};

/// What is read of a body unless told otherwise: shapes stand before the data.
pub const PREFIX: usize = 16 << 10;

/// The most rows that one request is believed to have.
pub const MAX_ROWS: u64 = 1 << 20;

/// What a request asks for, as far as was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// The model.
    pub model: Option<String>,
    /// Its version, where the client chose one.
    pub version: Option<String>,
    /// Rows; 1 when nothing says more.
    pub rows: u64,
}

/// Model and version of `…/v2/models/{model}[/versions/{version}]/infer` and of Triton's `generate` and
/// `generate_stream`; `None`: another path.
pub fn of_path(path: &str) -> Option<(&str, Option<&str>)> {
    let path = path.split('?').next().unwrap_or_default();
    let (_, rest) = path.split_once("/v2/models/")?;
    let mut parts = rest.split('/');
    let model = parts.next().filter(|model| !model.is_empty())?;
    let (version, verb) = match parts.next()? {
        "versions" => (Some(parts.next()?), parts.next()?),
        verb => (None, verb),
    };
    let asks = matches!(verb, "infer" | "generate" | "generate_stream") && parts.next().is_none();
    asks.then_some((model, version))
}

/// Reads a REST request: JSON, or JSON with binary tensors behind it. `header_length`: what
/// `Inference-Header-Content-Length` says; 0 is a raw tensor, which is one row.
pub fn rest(path: &str, header_length: Option<usize>, prefix: &[u8]) -> Option<Ask> {
    let (model, version) = of_path(path)?;
    let header = header_length.unwrap_or(usize::MAX).min(prefix.len());
    let mut rows = Rows::default();
    let mut shapes = Shapes { field: Depth::Elsewhere, rows: &mut rows, first: true };
    Scan::default().push(&prefix[..header], &mut shapes);
    Some(Ask { model: Some(model.to_owned()), version: version.map(str::to_owned), rows: rows.common() })
}

/// Reads a gRPC request: the frame of a `ModelInferRequest`. `None`: it is compressed, or too short to say anything.
pub fn grpc(prefix: &[u8]) -> Option<Ask> {
    let (&[compressed, ..], mut rest) = prefix.split_first_chunk::<5>()?;
    if compressed != 0 {
        return None;
    }
    let mut ask = Ask::default();
    let mut rows = Rows::default();
    while let Some(field) = Field::take(&mut rest) {
        match field {
            Field { number: 1, value: Value::Bytes(bytes) } => ask.model = text(bytes).or(ask.model),
            Field { number: 2, value: Value::Bytes(bytes) } => ask.version = text(bytes).or(ask.version),
            Field { number: 5, value: Value::Bytes(input) } => rows.input(rows_of(input)),
            // Its contents go on, but its shape stands before them.
            Field { number: 5, value: Value::Cut(input) } => {
                if let Some(found) = rows_of(input) {
                    rows.input(Some(found));
                }
            }
            _ => {}
        }
    }
    Some(Ask { rows: rows.common(), ..ask })
}

fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// The first dimension of an `InferInputTensor`, whose shape may come packed or not.
fn rows_of(mut input: &[u8]) -> Option<u64> {
    while let Some(field) = Field::take(&mut input) {
        match field {
            Field { number: 3, value: Value::Varint(rows) } => {
                return Some(rows.cast_signed().max(0).cast_unsigned());
            }
            Field { number: 3, value: Value::Bytes(mut shape) } => {
                let rows = prost::encoding::decode_varint(&mut shape).ok()?;
                return Some(rows.cast_signed().max(0).cast_unsigned());
            }
            _ => {}
        }
    }
    None
}

/// One field of a message of which only the beginning is there.
struct Field<'a> {
    number: u64,
    value: Value<'a>,
}

enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// The rest is not here.
    Cut(&'a [u8]),
    Fixed,
}

impl<'a> Field<'a> {
    /// The next field; `None`: there is no other, or this is no protobuf.
    fn take(rest: &mut &'a [u8]) -> Option<Self> {
        let key = prost::encoding::decode_varint(rest).ok()?;
        let value = match key & 7 {
            0 => Value::Varint(prost::encoding::decode_varint(rest).ok()?),
            1 | 5 => {
                *rest = rest.get(if key & 7 == 1 { 8 } else { 4 }..)?;
                Value::Fixed
            }
            2 => {
                let length = usize::try_from(prost::encoding::decode_varint(rest).ok()?).ok()?;
                match rest.split_at_checked(length) {
                    Some((bytes, after)) => {
                        *rest = after;
                        Value::Bytes(bytes)
                    }
                    None => Value::Cut(std::mem::take(rest)),
                }
            }
            _ => return None,
        };
        Some(Self { number: key >> 3, value })
    }
}

/// First dimensions of the inputs so far.
#[derive(Debug, Default)]
struct Rows {
    first: Option<u64>,
    differ: bool,
}

impl Rows {
    fn input(&mut self, rows: Option<u64>) {
        match (self.first, rows) {
            (Some(first), Some(rows)) => self.differ |= first != rows,
            (None, Some(rows)) => self.first = Some(rows),
            // A scalar has no rows, and then there is no batch.
            (_, None) => self.differ = true,
        }
    }

    fn common(&self) -> u64 {
        if self.differ { 1 } else { self.first.unwrap_or(1).clamp(1, MAX_ROWS) }
    }
}

/// Where in the document the scanner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// In the value of `inputs`.
    Inputs,
    /// In the value of an input's `shape`.
    Shape,
    /// Anywhere else.
    Elsewhere,
}

/// Looks for `inputs[*].shape[0]`.
struct Shapes<'a> {
    field: Depth,
    rows: &'a mut Rows,
    /// The next number is the first of its shape.
    first: bool,
}

impl Visit for Shapes<'_> {
    fn key(&mut self, depth: u32, name: &[u8]) {
        self.field = match (depth, name, self.field) {
            (1, b"inputs", _) => Depth::Inputs,
            (1, ..) => Depth::Elsewhere,
            (3, b"shape", Depth::Inputs) => {
                self.first = true;
                Depth::Shape
            }
            // Another key of the same input, or something inside it.
            (3, _, Depth::Shape) => Depth::Inputs,
            (_, _, field) => field,
        };
    }

    fn scalar(&mut self, depth: u32, token: &[u8]) {
        if self.field == Depth::Shape && depth == 4 && std::mem::take(&mut self.first) {
            self.rows.input(std::str::from_utf8(token).ok().and_then(|token| token.parse().ok()));
        }
    }

    fn close(&mut self, depth: u32) {
        if self.field == Depth::Shape && depth <= 4 {
            if std::mem::take(&mut self.first) {
                self.rows.input(None);
            }
            self.field = Depth::Inputs;
        }
    }

    fn text(&mut self, _: u32, _: &[u8]) {}

    fn text_end(&mut self, _: u32) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oip::grpc::{Contents, ModelInferRequest};
    use crate::oip::{InferRequest, Tensor, grpc as wire, rest as json};
    use proptest::prelude::*;
    use prost::Message as _;

    const PATH: &str = "/v2/models/resnet/versions/3/infer";

    fn request(rows: &[u64]) -> InferRequest {
        let inputs = rows.iter().enumerate().map(|(index, rows)| {
            Tensor::fp32(format!("input-{index}"), vec![*rows, 2], vec![0.5; *rows as usize * 2])
        });
        InferRequest { inputs: inputs.collect(), ..InferRequest::default() }
    }

    fn framed(request: InferRequest, contents: Contents) -> Vec<u8> {
        let message: ModelInferRequest = wire::encode_request("resnet", "3", request, contents).unwrap();
        let message = message.encode_to_vec();
        let mut framed = vec![0];
        framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
        framed.extend_from_slice(&message);
        framed
    }

    fn expected(rows: u64) -> Ask {
        Ask { model: Some("resnet".into()), version: Some("3".into()), rows }
    }

    #[test]
    fn paths_name_model_and_version() {
        for (path, found) in [
            ("/v2/models/m/infer", Some(("m", None))),
            ("/v2/models/m/versions/2/infer?x=y", Some(("m", Some("2")))),
            ("/serving/v2/models/m/generate_stream", Some(("m", None))),
            ("/v2/models/m/ready", None),
            ("/v2/models/m", None),
            ("/v2/models//infer", None),
            ("/v2/models/m/infer/more", None),
            ("/v1/models/m/infer", None),
        ] {
            assert_eq!(of_path(path), found, "{path}");
        }
    }

    #[test]
    fn every_wire_says_how_many_rows() {
        for (rows, counted) in [(&[8][..], 8), (&[8, 8], 8), (&[8, 4], 1), (&[], 1)] {
            for binary in [false, true] {
                let body = json::encode_request(&request(rows), binary).unwrap();
                let header = body.header_length;
                let bytes = body.into_bytes();
                assert_eq!(rest(PATH, header, &bytes), Some(expected(counted)), "{rows:?} {binary}");
            }
            for contents in [Contents::Raw, Contents::Typed] {
                assert_eq!(grpc(&framed(request(rows), contents)), Some(expected(counted)), "{rows:?}");
            }
        }
        assert_eq!(rest(PATH, Some(0), &[0; 100]), Some(expected(1)), "a raw tensor");
    }

    #[test]
    fn shapes_are_found_wherever_they_stand_and_nowhere_else() {
        for (body, rows) in [
            (r#"{"id":"x","shape":[9],"inputs":[{"data":[[1,2]],"shape":[4,2],"name":"shape"}]}"#, 4),
            (
                r#"{"inputs":[{"name":"a","parameters":{"shape":[7]},"shape":[3]}],"outputs":[{"shape":[5]}]}"#,
                3,
            ),
            (r#"{"inputs":[{"name":"a","shape":[]}]}"#, 1),
            (r#"{"inputs":[{"name":"a","shape":[-1,2]}]}"#, 1),
            (r#"{"inputs":[{"name":"a","shape":[99999999999]}]}"#, MAX_ROWS),
            (r#"{"inputs":[{"name":"a","shape":[6,2],"datatype":"FP32","data":[1,2,"#, 6),
            (r#"{"inputs":[{"name":"a","shape":[6"#, 1),
        ] {
            assert_eq!(rest(PATH, None, body.as_bytes()).unwrap().rows, rows, "{body}");
        }
    }

    #[test]
    fn a_frame_that_was_cut_is_read_up_to_there() {
        let whole = framed(request(&[16]), Contents::Raw);
        let cut = &whole[..whole.len() - 64];
        assert_eq!(grpc(cut), Some(expected(16)), "the raw contents come last");
        assert_eq!(grpc(&whole[..14]), Some(Ask { version: None, rows: 1, ..expected(1) }));
        let typed = framed(request(&[1600]), Contents::Typed);
        assert_eq!(grpc(&typed[..200]), Some(expected(1600)), "the shape stands before the contents");
        assert_eq!(grpc(&whole[..4]), None);
        assert_eq!(grpc(&[1, 0, 0, 0, 0]), None, "compressed");
    }

    proptest! {
        #[test]
        fn any_cut_and_any_garbage_is_borne(
            cut in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut frame = framed(request(&[4, 4]), Contents::Typed);
            let index = at.index(frame.len());
            frame[index] = byte;
            let frame = &frame[..cut.index(frame.len() + 1)];
            let mut body = json::encode_request(&request(&[4, 4]), false).unwrap().into_bytes().to_vec();
            let index = at.index(body.len());
            body[index] = byte;
            let body = &body[..cut.index(body.len() + 1)];
            for bytes in [frame, body, &garbage] {
                for ask in [grpc(bytes), rest(PATH, None, bytes), rest(PATH, Some(7), bytes)].into_iter().flatten() {
                    prop_assert!((1..=MAX_ROWS).contains(&ask.rows));
                }
            }
        }
    }
}
