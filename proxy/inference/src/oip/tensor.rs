//! Tensors: datatype, shape and bytes, and whether they fit each other.

use super::{MAX_RANK, Parameters, Problem};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Datatype {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 1 byte.
    Uint8,
    /// Unsigned, 2 bytes.
    Uint16,
    /// Unsigned, 4 bytes.
    Uint32,
    /// Unsigned, 8 bytes.
    Uint64,
    /// Signed, 1 byte.
    Int8,
    /// Signed, 2 bytes.
    Int16,
    /// Signed, 4 bytes.
    Int32,
    /// Signed, 8 bytes.
    Int64,
    /// IEEE 754 half precision; never JSON.
    Fp16,
    /// The upper half of FP32; never JSON.
    Bf16,
    /// IEEE 754 single precision.
    Fp32,
    /// IEEE 754 double precision.
    Fp64,
    /// Strings of bytes: each a length of 4 bytes, then the bytes.
    Bytes,
}

impl Datatype {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// As the protocol writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// Bytes of one element; `None` for [`Datatype::Bytes`], where each has its own.
    pub fn size(self) -> Option<usize> {
        Some(match self {
            Self::Bool | Self::Uint8 | Self::Int8 => 1,
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => 2,
            Self::Uint32 | Self::Int32 | Self::Fp32 => 4,
            Self::Uint64 | Self::Int64 | Self::Fp64 => 8,
            Self::Bytes => return None,
        })
    }

    pub(super) fn list() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Datatype {
    type Err = Problem;

    fn from_str(name: &str) -> Result<Self, Problem> {
        let found = Self::ALL.into_iter().find(|datatype| datatype.name() == name);
        found.ok_or_else(|| Problem::UnknownDatatype(name.chars().take(32).collect()))
    }
}

/// A tensor with its data.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name in the model.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions. None: a single element.
    pub shape: Vec<u64>,
    /// Parameters, without those that only say where the data is.
    pub parameters: Parameters,
    /// Row-major, little-endian; BYTES as length and bytes.
    pub data: Bytes,
}

impl Tensor {
    /// A tensor of FP32.
    pub fn fp32(name: impl Into<String>, shape: Vec<u64>, values: impl IntoIterator<Item = f32>) -> Self {
        let data: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self {
            name: name.into(),
            datatype: Datatype::Fp32,
            shape,
            parameters: Parameters::new(),
            data: data.into(),
        }
    }

    /// A tensor of BYTES.
    pub fn bytes<'a>(
        name: impl Into<String>,
        shape: Vec<u64>,
        values: impl IntoIterator<Item = &'a [u8]>,
    ) -> Self {
        let mut data = Vec::new();
        for value in values {
            data.extend((value.len() as u32).to_le_bytes());
            data.extend(value);
        }
        Self {
            name: name.into(),
            datatype: Datatype::Bytes,
            shape,
            parameters: Parameters::new(),
            data: data.into(),
        }
    }

    /// Its elements, if they are FP32.
    pub fn as_fp32(&self) -> Option<impl ExactSizeIterator<Item = f32> + '_> {
        let (elements, _) = self.data.as_chunks();
        (self.datatype == Datatype::Fp32).then(|| elements.iter().map(|le| f32::from_le_bytes(*le)))
    }

    /// Whether its data lies in shared memory, where its parameters say.
    pub fn in_shared_memory(&self) -> bool {
        self.parameters.contains_key(super::shm::REGION)
    }

    /// Whether the data is what datatype and shape ask for.
    pub fn check(&self) -> Result<(), Problem> {
        let expected = elements(&self.shape).ok_or_else(|| too_large(&self.shape))?;
        if let Some(size) = self.datatype.size() {
            let bytes = expected.checked_mul(size as u64).ok_or_else(|| too_large(&self.shape))?;
            if bytes != self.data.len() as u64 {
                return Err(Problem::ByteCount {
                    datatype: self.datatype,
                    shape: self.shape.clone(),
                    expected: bytes,
                    found: self.data.len() as u64,
                });
            }
        } else {
            let mut found = 0;
            for string in strings(&self.data) {
                string?;
                found += 1;
            }
            if found != expected {
                return Err(Problem::ElementCount { shape: self.shape.clone(), expected, found });
            }
        }
        if self.datatype == Datatype::Bool
            && let Some(index) = self.data.iter().position(|byte| *byte > 1)
        {
            let found = format!("the byte {}", self.data[index]);
            return Err(Problem::Element { index: index as u64, found, datatype: Datatype::Bool });
        }
        Ok(())
    }
}

/// How many elements a shape has; `None`: too many to count, or too many dimensions.
pub fn elements(shape: &[u64]) -> Option<u64> {
    if shape.len() > MAX_RANK {
        return None;
    }
    shape.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension))
}

/// The elements of BYTES data. After an error there are no more.
pub fn strings(data: &[u8]) -> impl Iterator<Item = Result<&[u8], Problem>> {
    let (mut rest, mut index) = (data, 0);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let left = rest.len().saturating_sub(4) as u64;
        let length = rest.split_first_chunk().map_or(4, |(le, _)| u64::from(u32::from_le_bytes(*le)));
        let end = 4 + length as usize;
        let Some(string) = rest.get(4..end) else {
            rest = &[];
            return Some(Err(Problem::BytesCut { index, length, left }));
        };
        rest = &rest[end..];
        index += 1;
        Some(Ok(string))
    })
}

/// A shape as it came over a wire, where dimensions are signed.
pub(super) fn shape(wire: &[i64]) -> Result<Vec<u64>, Problem> {
    let shape: Result<Vec<u64>, _> = wire.iter().map(|dimension| u64::try_from(*dimension)).collect();
    let shape =
        shape.map_err(|_| Problem::NegativeDimension(wire[..wire.len().min(MAX_RANK + 1)].to_vec()))?;
    elements(&shape).ok_or_else(|| too_large(&shape))?;
    Ok(shape)
}

/// The same, back.
pub(super) fn wire_shape(shape: &[u64]) -> Vec<i64> {
    shape.iter().map(|dimension| i64::try_from(*dimension).unwrap_or(i64::MAX)).collect()
}

fn too_large(shape: &[u64]) -> Problem {
    Problem::TooLarge(wire_shape(&shape[..shape.len().min(MAX_RANK + 1)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_survive_the_way() {
        for datatype in Datatype::ALL {
            assert_eq!(datatype.name().parse(), Ok(datatype));
            assert_eq!(serde_json::to_value(datatype).unwrap(), datatype.name());
        }
        let problem = "FLOAT".parse::<Datatype>().unwrap_err().to_string();
        assert!(
            problem.starts_with("the datatype \"FLOAT\" is not one of the protocol's: BOOL, UINT8,"),
            "{problem}"
        );
    }

    #[test]
    fn bytes_and_shape_must_fit() {
        let mut tensor = Tensor::fp32("x", vec![2, 2], [0.0; 4]);
        assert_eq!(tensor.check(), Ok(()));
        tensor.shape = vec![2, 3];
        let problem = tensor.check().unwrap_err().to_string();
        assert_eq!(problem, "FP32 of shape [2, 3] has 24 bytes, but the data has 16");
        tensor.shape = vec![u64::MAX, 2];
        assert!(matches!(tensor.check(), Err(Problem::TooLarge(_))));
        tensor.shape = vec![1; MAX_RANK + 1];
        assert!(matches!(tensor.check(), Err(Problem::TooLarge(_))));
        let yes =
            Tensor { datatype: Datatype::Bool, shape: vec![2], data: Bytes::from_static(&[1, 2]), ..tensor };
        assert_eq!(
            yes.check().unwrap_err().to_string(),
            "element 1 of the data is the byte 2, which is not BOOL"
        );
    }

    #[test]
    fn lengths_inside_bytes_must_add_up() {
        let tensor = Tensor::bytes("s", vec![2], [&b"ab"[..], b""]);
        assert_eq!(tensor.check(), Ok(()));
        assert_eq!(strings(&tensor.data).collect::<Result<Vec<_>, _>>(), Ok(vec![&b"ab"[..], b""]));
        let cut = Tensor { data: tensor.data.slice(..5), ..tensor.clone() };
        assert_eq!(cut.check(), Err(Problem::BytesCut { index: 0, length: 2, left: 1 }));
        let cut = Tensor { data: tensor.data.slice(..8), ..tensor.clone() };
        assert_eq!(cut.check(), Err(Problem::BytesCut { index: 1, length: 4, left: 0 }));
        let short = Tensor { shape: vec![3], ..tensor };
        assert_eq!(short.check(), Err(Problem::ElementCount { shape: vec![3], expected: 3, found: 2 }));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(data in prop::collection::vec(any::<u8>(), 0..64), shape in prop::collection::vec(any::<u64>(), 0..20)) {
            for datatype in Datatype::ALL {
                let tensor = Tensor { name: "x".into(), datatype, shape: shape.clone(), parameters: Parameters::new(), data: data.clone().into() };
                let _ = tensor.check();
            }
        }
    }
}
