//! A tensor's elements as JSON: read into bytes, written from bytes.
//!
//! The JSON was validated before it comes here, so reading is a walk over tokens: no recursion, whatever the nesting, and
//! numbers are parsed as what they shall be, not by way of a double.

use super::{Datatype, MAX_RANK, Problem, strings};
use bytes::{BufMut, Bytes, BytesMut};
use serde::ser::{Error as _, Serialize, SerializeSeq, Serializer};

/// Reads the elements of a JSON array, flat or nested.
pub(super) fn read(json: &str, datatype: Datatype) -> Result<Bytes, Problem> {
    if matches!(datatype, Datatype::Fp16 | Datatype::Bf16) {
        return Err(Problem::BinaryOnly(datatype));
    }
    let json = json.trim_ascii();
    if !json.starts_with('[') {
        return Err(Problem::NotAnArray);
    }
    // Numbers have a comma between them; a string is not longer than its JSON, but for the length before it.
    let mut out = BytesMut::with_capacity(match datatype.size() {
        Some(size) => (json.bytes().filter(|byte| *byte == b',').count() + 1) * size,
        None => json.len(),
    });
    let (mut rest, mut depth, mut index) = (json, 0, 0);
    while let Some(first) = rest.bytes().next() {
        let length = match first {
            b'[' => {
                depth += 1;
                if depth > MAX_RANK {
                    return Err(element(index, "an array nested too deeply", datatype));
                }
                1
            }
            b']' => {
                depth -= 1;
                1
            }
            b',' | b' ' | b'\t' | b'\n' | b'\r' => 1,
            b'{' => return Err(element(index, "an object", datatype)),
            b'"' => {
                let length = string_length(rest);
                let token = &rest[..length];
                match serde_json::from_str::<String>(token) {
                    Ok(string) if datatype == Datatype::Bytes => {
                        out.put_u32_le(string.len() as u32);
                        out.put_slice(string.as_bytes());
                    }
                    _ => return Err(element(index, token, datatype)),
                }
                index += 1;
                length
            }
            _ => {
                let end = rest.find([',', ']', ' ', '\t', '\n', '\r']).unwrap_or(rest.len());
                let token = &rest[..end];
                put(token, datatype, &mut out).ok_or_else(|| element(index, token, datatype))?;
                index += 1;
                end
            }
        };
        rest = &rest[length..];
    }
    Ok(out.freeze())
}

/// From the opening quote to behind the closing one.
fn string_length(json: &str) -> usize {
    let mut escaped = false;
    let end = json.bytes().skip(1).position(|byte| {
        let closes = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        closes
    });
    end.map_or(json.len(), |end| end + 2)
}

/// Parses a number or boolean into its bytes; `None`: it is not of this datatype.
fn put(token: &str, datatype: Datatype, out: &mut BytesMut) -> Option<()> {
    match datatype {
        Datatype::Bool => out.put_u8(token.parse::<bool>().ok()?.into()),
        Datatype::Uint8 => out.put_u8(token.parse().ok()?),
        Datatype::Uint16 => out.put_u16_le(token.parse().ok()?),
        Datatype::Uint32 => out.put_u32_le(token.parse().ok()?),
        Datatype::Uint64 => out.put_u64_le(token.parse().ok()?),
        Datatype::Int8 => out.put_i8(token.parse().ok()?),
        Datatype::Int16 => out.put_i16_le(token.parse().ok()?),
        Datatype::Int32 => out.put_i32_le(token.parse().ok()?),
        Datatype::Int64 => out.put_i64_le(token.parse().ok()?),
        Datatype::Fp32 => out.put_f32_le(token.parse().ok().filter(|value: &f32| value.is_finite())?),
        Datatype::Fp64 => out.put_f64_le(token.parse().ok().filter(|value: &f64| value.is_finite())?),
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Bytes => return None,
    }
    Some(())
}

fn element(index: u64, found: &str, datatype: Datatype) -> Problem {
    let found = match found.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &found[..end]),
        None => found.to_owned(),
    };
    Problem::Element { index, found, datatype }
}

/// Whether [`Elements`] can write them.
pub(super) fn writable(datatype: Datatype, data: &[u8]) -> Result<(), Problem> {
    let not_finite = match datatype {
        Datatype::Fp16 | Datatype::Bf16 => return Err(Problem::BinaryOnly(datatype)),
        Datatype::Fp32 => data.as_chunks().0.iter().position(|le| !f32::from_le_bytes(*le).is_finite()),
        Datatype::Fp64 => data.as_chunks().0.iter().position(|le| !f64::from_le_bytes(*le).is_finite()),
        Datatype::Bytes => {
            for (index, string) in (0..).zip(strings(data)) {
                std::str::from_utf8(string?).map_err(|_| Problem::NotUtf8(index))?;
            }
            None
        }
        _ => None,
    };
    not_finite.map_or(Ok(()), |index| Err(Problem::NotFinite(index as u64)))
}

/// Writes elements as a flat JSON array. What is not [`writable`] fails without telling which tensor it was.
pub(super) struct Elements<'a> {
    pub(super) datatype: Datatype,
    pub(super) data: &'a [u8],
}

impl Serialize for Elements<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let data = self.data;
        match self.datatype {
            Datatype::Bool => to.collect_seq(data.iter().map(|byte| *byte != 0)),
            Datatype::Uint8 => to.collect_seq(data),
            Datatype::Uint16 => numbers(data, u16::from_le_bytes, to),
            Datatype::Uint32 => numbers(data, u32::from_le_bytes, to),
            Datatype::Uint64 => numbers(data, u64::from_le_bytes, to),
            Datatype::Int8 => to.collect_seq(data.iter().map(|byte| byte.cast_signed())),
            Datatype::Int16 => numbers(data, i16::from_le_bytes, to),
            Datatype::Int32 => numbers(data, i32::from_le_bytes, to),
            Datatype::Int64 => numbers(data, i64::from_le_bytes, to),
            Datatype::Fp16 | Datatype::Bf16 => Err(S::Error::custom(Problem::BinaryOnly(self.datatype))),
            Datatype::Fp32 => numbers(data, f32::from_le_bytes, to),
            Datatype::Fp64 => numbers(data, f64::from_le_bytes, to),
            Datatype::Bytes => {
                let mut list = to.serialize_seq(None)?;
                for string in strings(data) {
                    let string = string.map_err(S::Error::custom)?;
                    list.serialize_element(std::str::from_utf8(string).map_err(S::Error::custom)?)?;
                }
                list.end()
            }
        }
    }
}

fn numbers<const N: usize, T: Serialize, S: Serializer>(
    data: &[u8],
    from_le: impl Fn([u8; N]) -> T,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_seq(data.as_chunks::<N>().0.iter().map(|le| from_le(*le)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(datatype: Datatype, data: &[u8]) -> Result<String, Problem> {
        writable(datatype, data)?;
        Ok(serde_json::to_string(&Elements { datatype, data }).unwrap())
    }

    #[test]
    fn every_datatype_is_read_and_written() {
        for (datatype, json) in [
            (Datatype::Bool, "[true,false]"),
            (Datatype::Uint8, "[0,255]"),
            (Datatype::Uint16, "[0,65535]"),
            (Datatype::Uint32, "[0,4294967295]"),
            (Datatype::Uint64, "[0,18446744073709551615]"),
            (Datatype::Int8, "[-128,127]"),
            (Datatype::Int16, "[-32768,32767]"),
            (Datatype::Int32, "[-2147483648,2147483647]"),
            (Datatype::Int64, "[-9223372036854775808,9223372036854775807]"),
            (Datatype::Fp32, "[0.1,-0.0,3.4028235e+38,1e-45]"),
            (Datatype::Fp64, "[0.1,-0.0,1.7976931348623157e+308,5e-324]"),
            (Datatype::Bytes, r#"["","a\"b\\","ü\u0001, ]"]"#),
        ] {
            let data = read(json, datatype).unwrap();
            assert_eq!(write(datatype, &data).unwrap(), json, "{datatype}");
        }
    }

    #[test]
    fn nested_is_the_same_as_flat() {
        let flat = read("[1,2,3,4]", Datatype::Fp32);
        assert_eq!(read(" [ [1, 2.0] ,\n[3e0, 4]] ", Datatype::Fp32), flat);
        assert_eq!(read("[]", Datatype::Fp32), Ok(Bytes::new()));
        let deep = format!("{}1{}", "[".repeat(17), "]".repeat(17));
        assert!(read(&deep, Datatype::Fp32).is_err());
    }

    #[test]
    fn a_wrong_element_is_named() {
        for (json, datatype, sentence) in [
            ("[1, 300]", Datatype::Uint8, "element 1 of the data is 300, which is not UINT8"),
            ("[1, 2.5]", Datatype::Int32, "element 1 of the data is 2.5, which is not INT32"),
            ("[1e39]", Datatype::Fp32, "element 0 of the data is 1e39, which is not FP32"),
            ("[null]", Datatype::Fp32, "element 0 of the data is null, which is not FP32"),
            ("[1]", Datatype::Bool, "element 0 of the data is 1, which is not BOOL"),
            ("[{\"a\": 1}]", Datatype::Fp32, "element 0 of the data is an object, which is not FP32"),
            ("[0, \"1\"]", Datatype::Fp32, "element 1 of the data is \"1\", which is not FP32"),
            ("[7]", Datatype::Bytes, "element 0 of the data is 7, which is not BYTES"),
            ("7", Datatype::Fp32, "the data is not a JSON array"),
        ] {
            assert_eq!(read(json, datatype).unwrap_err().to_string(), sentence);
        }
        assert_eq!(read("[1]", Datatype::Fp16), Err(Problem::BinaryOnly(Datatype::Fp16)));
    }

    #[test]
    fn what_json_cannot_say_is_not_written() {
        assert_eq!(write(Datatype::Fp32, &f32::NAN.to_le_bytes()), Err(Problem::NotFinite(0)));
        assert_eq!(write(Datatype::Bytes, &[1, 0, 0, 0, 255]), Err(Problem::NotUtf8(0)));
        assert_eq!(write(Datatype::Bf16, &[0, 0]), Err(Problem::BinaryOnly(Datatype::Bf16)));
    }

    proptest! {
        #[test]
        fn floats_survive_the_way_to_the_last_bit(single in any::<f32>(), double in any::<f64>()) {
            prop_assume!(single.is_finite() && double.is_finite());
            let json = write(Datatype::Fp32, &single.to_le_bytes()).unwrap();
            prop_assert_eq!(&read(&json, Datatype::Fp32).unwrap()[..], single.to_le_bytes());
            let json = write(Datatype::Fp64, &double.to_le_bytes()).unwrap();
            prop_assert_eq!(&read(&json, Datatype::Fp64).unwrap()[..], double.to_le_bytes());
        }

        #[test]
        fn strings_survive_the_way(strings in prop::collection::vec(any::<String>(), 0..5)) {
            let json = serde_json::to_string(&strings).unwrap();
            let data = read(&json, Datatype::Bytes).unwrap();
            prop_assert_eq!(write(Datatype::Bytes, &data).unwrap(), json);
        }
    }
}
