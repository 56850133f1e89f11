//! Random requests for the models of the real servers, and what each must be answered, computed here.
//!
//! In: what a server can be asked, and randomness. Out: a [`Case`]. What differs in content does so in few ways, so that
//! requests of many clients can share executions; how they travel differs freely, since that must not matter.

use bytes::Bytes;
use penstock_inference::oip::grpc::Contents;
use penstock_inference::oip::{
    Datatype, InferRequest, Parameter, Parameters, RequestedOutput, Tensor, strings,
};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::ask::{Ask, Form};

/// Contents that come again and again, so that the same is in flight at the same time.
const REPEATED: u64 = 12;
/// What an FP32 and an FP64 may be that JSON cannot say, or cannot say exactly: NaN with a payload, infinity, -0.0.
const SINGLES: [u32; 4] = [0x7fc0_1234, 0x7f80_0000, 0xff80_0000, 0x8000_0000];
const DOUBLES: [u64; 3] = [0x7ff8_0000_0000_1234, 0x7ff0_0000_0000_0000, 0x8000_0000_0000_0000];
/// Strings that JSON has to escape.
const TEXTS: [&str; 7] = ["", "a", "two words", "\"quoted\" \\ \n\t", "größer", "日本語", "🜚 and more"];

/// A model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `rowsum` with rows of any width.
    Rowsum,
    /// `rowsum` with rows of 4,096 values: what is handed over in shared memory.
    Wide,
    /// `kinds`: every datatype.
    Kinds,
    /// The model of `tests/models/exact`.
    Exact,
}

/// What a server can be asked.
#[derive(Clone, Copy, Debug)]
pub struct Can {
    /// Its models, those that are asked more often more often.
    pub kinds: &'static [Kind],
    /// Over gRPC too.
    pub grpc: bool,
    /// With tensors behind the JSON.
    pub binary: bool,
    /// For versions.
    pub versions: bool,
    /// BYTES may be any bytes, ids any text, and floats any bits; otherwise BYTES must be text, ids ASCII, and floats finite.
    pub any_bytes: bool,
}

/// A request, and what it must be answered.
#[derive(Clone, Debug)]
pub struct Case {
    /// The request.
    pub ask: Ask,
    /// The outputs, by their names; `None`: the server refuses it, in words of its own.
    pub expected: Option<Vec<Tensor>>,
    /// It does not want to share.
    pub alone: bool,
}

/// What is asked, however it travels.
struct Content {
    model: &'static str,
    version: &'static str,
    inputs: Vec<Tensor>,
    outputs: Vec<&'static str>,
    parameters: Parameters,
    /// All outputs that the model gives.
    gives: Vec<Tensor>,
    /// JSON can say all of it.
    plain: bool,
    /// The server does not like it.
    wrong: bool,
}

/// The next request of a client.
pub fn case(can: &Can, random: &mut SmallRng) -> Case {
    let again = random.random_bool(0.2);
    let seed = if again { random.random_range(0..REPEATED) } else { random.random() };
    let mut content = content(can, &mut SmallRng::seed_from_u64(seed));
    if !again && random.random_bool(0.02) {
        spoil(&mut content, random);
    }
    let (form, binary) = form(can, &content, random);
    let wants = content.outputs.iter().map(|name| RequestedOutput {
        name: (*name).to_owned(),
        parameters: if binary.contains(&Some(*name)) { said("binary_data") } else { Parameters::new() },
    });
    let outputs: Vec<_> = wants.collect();
    let mut parameters = content.parameters.clone();
    if binary.contains(&None) {
        parameters.append(&mut said("binary_data_output"));
    }
    let alone = random.random_bool(0.1);
    let batch = if alone { Some("off") } else { random.random_bool(0.3).then_some("show") };
    let id = match random.random_range(0..4) {
        0 => None,
        // MLServer puts the id into a header of its gRPC answers, and fails where it cannot.
        1 if can.any_bytes => Some("größe 7 \"x\"".to_owned()),
        _ => Some(format!("id-{:x}", random.random::<u32>())),
    };
    let mut expected = content.gives;
    expected.retain(|output| outputs.is_empty() || outputs.iter().any(|wanted| wanted.name == output.name));
    expected.sort_by(|a, b| a.name.cmp(&b.name));
    Case {
        ask: Ask {
            model: content.model.to_owned(),
            version: content.version.to_owned(),
            request: InferRequest { id, parameters, inputs: content.inputs, outputs },
            form,
            headers: batch.map(|word| ("penstock-batch", word.to_owned())).into_iter().collect(),
        },
        expected: (!content.wrong).then_some(expected),
        alone,
    }
}

fn said(name: &str) -> Parameters {
    [(name.to_owned(), Parameter::Bool(true))].into()
}

fn content(can: &Can, random: &mut SmallRng) -> Content {
    let kind = *can.kinds.choose(random).unwrap();
    let rows = *[1, 1, 1, 2, 3, 5].choose(random).unwrap();
    let version = match random.random_range(0..20) {
        0 if can.versions => "1",
        1 if can.versions => "2",
        _ => "",
    };
    match kind {
        Kind::Rowsum => rowsum("rowsum", if random.random_bool(0.1) { 17 } else { 3 }, rows, random),
        Kind::Wide => rowsum("wide", 4096, rows, random),
        Kind::Kinds => kinds(can, version, rows, random),
        Kind::Exact => exact(version, rows, random),
    }
}

fn rowsum(model: &'static str, width: usize, rows: usize, random: &mut SmallRng) -> Content {
    let values: Vec<f32> = (0..rows * width).map(|_| f32::from(random.random_range(-999_i16..999))).collect();
    let more = random.random_bool(0.85);
    let factors: Vec<i64> = (0..rows).map(|_| if more { random.random_range(-9..9) } else { 1 }).collect();
    let labels: Vec<&str> =
        (0..rows).map(|_| if more { *TEXTS.choose(random).unwrap() } else { "" }).collect();
    let of_row = |row: usize| values[row * width..][..width].iter().map(|value| *value as i64).sum::<i64>();
    let totals: Vec<i64> = (0..rows).map(|row| of_row(row) * factors[row]).collect();
    let notes: Vec<String> =
        labels.iter().zip(&totals).map(|(label, total)| format!("{label}:{total}")).collect();
    let few = || vec![rows as u64, 1];
    let wide = vec![rows as u64, width as u64];
    let gives = vec![
        tensor("total", Datatype::Int64, few(), totals.iter().flat_map(|total| total.to_le_bytes())),
        Tensor::fp32("scaled", wide.clone(), values.iter().map(|value| value * 2.0)),
        Tensor::bytes("note", few(), notes.iter().map(String::as_bytes)),
    ];
    let mut inputs = vec![Tensor::fp32("values", wide, values)];
    if more {
        let factors = factors.iter().flat_map(|factor| factor.to_le_bytes());
        inputs.push(tensor("factor", Datatype::Int64, few(), factors));
        // Rows of strings differ in length, and keep the others out of shared memory.
        if model == "rowsum" {
            inputs.push(Tensor::bytes("label", few(), labels.iter().map(|label| label.as_bytes())));
        }
    }
    let note = gives.last().unwrap().clone();
    let outputs: &[&[&'static str]] = match model {
        // Of these the sizes are known before, so that the server can write them where it is told.
        "wide" => &[&["total", "scaled"]],
        _ => &[&[], &[], &[], &[], &[], &[], &["total"], &["note", "total"], &["scaled"]],
    };
    let outputs = outputs.choose(random).unwrap().to_vec();
    // A label that is not sent is empty.
    let unlabelled = inputs.iter().all(|input| input.name != "label");
    let gives = gives.into_iter().map(|output| match output.name.as_str() {
        "note" if unlabelled => {
            let notes: Vec<String> = totals.iter().map(|total| format!(":{total}")).collect();
            Tensor::bytes("note", note.shape.clone(), notes.iter().map(String::as_bytes))
        }
        _ => output,
    });
    let gives = gives.collect();
    let parameters = Parameters::new();
    Content { model, version: "", inputs, outputs, parameters, gives, plain: true, wrong: false }
}

fn kinds(can: &Can, version: &'static str, rows: usize, random: &mut SmallRng) -> Content {
    const SETS: [&[&str]; 6] = [
        &["long", "text"],
        &["single", "double"],
        &["half", "long"],
        &["byte", "short", "flag"],
        &["text"],
        &["half", "single", "double", "long", "short", "byte", "flag", "text"],
    ];
    let only_plain = !can.grpc && !can.binary;
    // MLServer makes nothing of NaN, and cannot answer it.
    let plain = only_plain || !can.any_bytes || random.random_bool(0.7);
    let sets = if only_plain { &SETS[..2] } else { &SETS[..] };
    // One much more often than the others: they cannot share with each other.
    let names = if random.random_bool(0.4) { SETS[0] } else { *sets.choose(random).unwrap() };
    let width = if random.random_bool(0.1) { 1 } else { 4 };
    let inputs: Vec<Tensor> =
        names.iter().map(|name| of_kind(name, rows, width, plain, can.any_bytes, random)).collect();
    let add = if random.random_bool(0.1) { 7_i64 } else { 0 };
    let mut parameters = Parameters::new();
    if add != 0 {
        parameters.insert("add".to_owned(), Parameter::Int(add));
    }
    let mut gives: Vec<Tensor> = inputs.iter().map(|input| back(input, rows)).collect();
    // The newest, unless said otherwise.
    let number: i64 = version.parse().unwrap_or(2);
    let sums = (0..rows)
        .map(|row| add + 1_000_003 * number + inputs.iter().map(|i| sum(i, row, width)).sum::<i64>());
    let sums: Vec<u8> = sums.flat_map(i64::to_le_bytes).collect();
    gives.push(tensor("sum", Datatype::Int64, vec![rows as u64, 1], sums));
    if let Some(bytes) = inputs.iter().find(|input| input.name == "byte") {
        let halves = bytes.data.iter().flat_map(|byte| half(*byte).to_le_bytes());
        gives.push(tensor("byte_half", Datatype::Fp16, bytes.shape.clone(), halves));
    }
    let outputs = match random.random_range(0..8) {
        0 => vec!["sum"],
        1 if names.contains(&"byte") => vec!["byte_half", "sum"],
        1 => vec!["sum", if names.contains(&"text") { "text_back" } else { "sum" }],
        _ => Vec::new(),
    };
    let outputs = if outputs == ["sum", "sum"] { vec!["sum"] } else { outputs };
    Content { model: "kinds", version, inputs, outputs, parameters, gives, plain, wrong: false }
}

/// A whole number of 0 to 255 in half precision, exactly.
fn half(byte: u8) -> u16 {
    match byte.checked_ilog2() {
        None => 0,
        Some(exponent) => {
            let mantissa = (u16::from(byte) << (10 - exponent)) & 0x3ff;
            (15 + exponent as u16) << 10 | mantissa
        }
    }
}

/// A random input of `kinds`.
fn of_kind(name: &str, rows: usize, width: usize, plain: bool, any: bool, random: &mut SmallRng) -> Tensor {
    let (count, shape) = (rows * width, vec![rows as u64, width as u64]);
    let special = |random: &mut SmallRng| !plain && random.random_bool(0.2);
    let mut data: Vec<u8> = Vec::new();
    let datatype = match name {
        "half" => Datatype::Fp16,
        "single" => Datatype::Fp32,
        "double" => Datatype::Fp64,
        "long" => Datatype::Int64,
        "short" => Datatype::Int16,
        "byte" => Datatype::Uint8,
        "flag" => Datatype::Bool,
        _ => Datatype::Bytes,
    };
    for _ in 0..count {
        match datatype {
            // Without one bit of the exponent it is finite.
            Datatype::Fp16 if plain => data.extend((random.random::<u16>() & 0xbfff).to_le_bytes()),
            Datatype::Fp16 => data.extend(random.random::<u16>().to_le_bytes()),
            Datatype::Fp32 if special(random) => data.extend(SINGLES.choose(random).unwrap().to_le_bytes()),
            Datatype::Fp32 => data.extend((random.random::<f32>() * 2e6 - 1e6).to_le_bytes()),
            Datatype::Fp64 if special(random) => data.extend(DOUBLES.choose(random).unwrap().to_le_bytes()),
            // Triton reads decimals of JSON that have many digits up to some bits wrong.
            Datatype::Fp64 => data.extend((f64::from(random.random::<i32>()) / 16.0).to_le_bytes()),
            Datatype::Int64 => data.extend(random.random_range(-(1_i64 << 52)..1 << 52).to_le_bytes()),
            Datatype::Int16 => data.extend(random.random::<i16>().to_le_bytes()),
            Datatype::Bool => data.push(random.random::<bool>().into()),
            Datatype::Bytes => {
                let mut wild = [0; 9];
                random.fill(&mut wild);
                let wild_enough = any && special(random);
                let text = if wild_enough { &wild[..] } else { TEXTS.choose(random).unwrap().as_bytes() };
                data.extend((text.len() as u32).to_le_bytes());
                data.extend(text);
            }
            _ => data.push(random.random()),
        }
    }
    tensor(name, datatype, shape, data)
}

/// The rows of an input, each turned around.
fn back(input: &Tensor, rows: usize) -> Tensor {
    let elements: Vec<Bytes> = match input.datatype.size() {
        Some(size) => input.data.chunks(size).map(Bytes::copy_from_slice).collect(),
        None => strings(&input.data)
            .map(|text| {
                let text = text.unwrap();
                [&(text.len() as u32).to_le_bytes()[..], text].concat().into()
            })
            .collect(),
    };
    let width = elements.len() / rows;
    let turned = elements.chunks(width).flat_map(|row| row.iter().rev()).flatten().copied();
    tensor(&format!("{}_back", input.name), input.datatype, input.shape.clone(), turned)
}

/// What a row of an input adds to the sum.
fn sum(input: &Tensor, row: usize, width: usize) -> i64 {
    match input.datatype {
        Datatype::Bytes => {
            strings(&input.data).skip(row * width).take(width).map(|text| text.unwrap().len() as i64).sum()
        }
        Datatype::Int64 => {
            input.data.as_chunks().0[row * width..][..width].iter().map(|le| i64::from_le_bytes(*le)).sum()
        }
        Datatype::Int16 => input.data.as_chunks().0[row * width..][..width]
            .iter()
            .map(|le| i64::from(i16::from_le_bytes(*le)))
            .sum(),
        Datatype::Uint8 | Datatype::Bool => {
            input.data[row * width..][..width].iter().map(|byte| i64::from(*byte)).sum()
        }
        _ => 0,
    }
}

fn exact(version: &'static str, rows: usize, random: &mut SmallRng) -> Content {
    let values: Vec<f32> = (0..rows * 16).map(|_| f32::from(random.random_range(-999_i16..999))).collect();
    let factors: Vec<i32> = (0..rows).map(|_| random.random_range(-9..9)).collect();
    let flags: Vec<u8> = (0..rows * 4).map(|_| random.random::<bool>().into()).collect();
    let times = if version == "1" { 2.0 } else { 4.0 };
    let (few, wide, four) = (vec![rows as u64, 1], vec![rows as u64, 16], vec![rows as u64, 4]);
    let totals = values.chunks(16).zip(&factors);
    let totals = totals.map(|(row, factor)| row.iter().map(|value| *value as i32).sum::<i32>() * factor);
    let totals: Vec<u8> = totals.flat_map(i32::to_le_bytes).collect();
    let flag = tensor("flag", Datatype::Bool, four.clone(), flags.iter().copied());
    let gives = vec![
        tensor("total", Datatype::Int32, few.clone(), totals),
        Tensor::fp32("scaled", wide.clone(), values.iter().map(|value| value * times)),
        back(&flag, rows),
        tensor("half", Datatype::Fp16, four, flags.iter().flat_map(|flag| half(*flag).to_le_bytes())),
    ];
    let inputs = vec![
        Tensor::fp32("values", wide, values),
        tensor("factor", Datatype::Int32, few, factors.iter().flat_map(|factor| factor.to_le_bytes())),
        flag,
    ];
    let outputs: &[&[&'static str]] =
        &[&[], &[], &["total", "scaled"], &["total", "scaled"], &["flag_back"], &["half"]];
    let outputs = outputs.choose(random).unwrap().to_vec();
    let parameters = Parameters::new();
    Content { model: "rowsum", version, inputs, outputs, parameters, gives, plain: true, wrong: false }
}

/// Makes it something that the server refuses.
fn spoil(content: &mut Content, random: &mut SmallRng) {
    content.wrong = true;
    match random.random_range(0..4) {
        0 => content.model = "nobody",
        1 => content.version = "9",
        2 => content.outputs = vec!["nothing"],
        _ => {
            let input = &mut content.inputs[0];
            input.name = "stranger".to_owned();
        }
    }
}

/// How a request travels, and which outputs are to come behind the JSON; `None` among them: all.
fn form(can: &Can, content: &Content, random: &mut SmallRng) -> (Form, Vec<Option<&'static str>>) {
    let is_half = |tensor: &Tensor| tensor.datatype == Datatype::Fp16;
    let halves_in = content.inputs.iter().any(is_half);
    let named = |name: &str| content.outputs.is_empty() || content.outputs.contains(&name);
    let halves_out = content.gives.iter().any(|output| is_half(output) && named(&output.name));
    let json = content.plain && !halves_in && !halves_out;
    let mut forms = Vec::new();
    if can.grpc {
        forms.push(0);
        // MLServer cannot write half-precision numbers as a list, and does not fall back on bytes.
        if !halves_in && (can.any_bytes || !halves_out) {
            forms.push(1);
        }
    }
    if can.binary {
        forms.push(2);
        if content.plain {
            forms.push(3);
        }
    }
    if json {
        forms.push(4);
    }
    let all = |names: &[&'static str]| match names {
        [] => vec![None],
        names => names.iter().copied().map(Some).collect(),
    };
    match forms.choose(random).unwrap() {
        0 => (Form::Grpc(Contents::Raw), Vec::new()),
        1 => (Form::Grpc(Contents::Typed), Vec::new()),
        2 => (Form::Rest(vec![true; content.inputs.len()]), all(&content.outputs)),
        3 => {
            let behind = content.inputs.iter().map(|input| is_half(input) || random.random()).collect();
            let binary = match content.outputs.is_empty() {
                true if halves_out || random.random() => vec![None],
                true => Vec::new(),
                false => {
                    let half =
                        |name: &str| content.gives.iter().any(|given| given.name == name && is_half(given));
                    let chosen = content.outputs.iter().filter(|name| half(name) || random.random());
                    chosen.copied().map(Some).collect()
                }
            };
            (Form::Rest(behind), binary)
        }
        _ => (Form::Rest(vec![false; content.inputs.len()]), Vec::new()),
    }
}

fn tensor(name: &str, datatype: Datatype, shape: Vec<u64>, data: impl IntoIterator<Item = u8>) -> Tensor {
    let data = data.into_iter().collect::<Vec<u8>>().into();
    Tensor { name: name.to_owned(), datatype, shape, parameters: Parameters::new(), data }
}
