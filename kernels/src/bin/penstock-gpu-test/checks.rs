//! Kernels and copies against the CPU, on random inputs.

use penstock_kernels::arena::{Access, Arena, Kind};
use penstock_kernels::cuda::{Conversion, Rows, Source};
use penstock_kernels::fused::{Filter, Format, reference};
use penstock_kernels::normalise::{Dtype, Layout, bf16_bits, f16_bits, f32_of_bf16, f32_of_f16};

use crate::bed::{Bed, Failure, wrong};

type Check = fn(&Bed, u32) -> Result<String, Failure>;

/// All of them. Each says how it went.
pub(crate) const ALL: &[(&str, Check)] = &[
    ("prepare: RGB", |bed, rounds| prepare(bed, Format::Rgb, rounds)),
    ("prepare: gray", |bed, rounds| prepare(bed, Format::Gray, rounds)),
    ("prepare: NV12", |bed, rounds| prepare(bed, Format::Nv12, rounds)),
    ("prepare: YUV420", |bed, rounds| prepare(bed, Format::I420, rounds)),
    ("convert", convert),
    ("gather and scatter", rows),
    ("memory: pinned", |bed, _| there_and_back(bed, Kind::Pinned { context: &bed.context })),
    ("memory: shared and registered", |bed, _| {
        let (node, name, access) = ("gpu-test", "registered", Access::Group(None));
        there_and_back(bed, Kind::Registered { context: &bed.context, node, name, access })
    }),
    ("streams: one waits for the other", order),
];

fn number(dtype: Dtype, le: &[u8]) -> f32 {
    let half = || u16::from_le_bytes([le[0], le[1]]);
    match dtype {
        Dtype::U8 => f32::from(le[0]),
        Dtype::F16 => f32_of_f16(half()),
        Dtype::Bf16 => f32_of_bf16(half()),
        Dtype::F32 => f32::from_le_bytes([le[0], le[1], le[2], le[3]]),
    }
}

/// Batches of images of any size, bit for bit as the CPU makes them, and as near to float64 as docs/PIPELINES.md says.
fn prepare(bed: &Bed, format: Format, rounds: u32) -> Result<String, Failure> {
    let mut dice = bed.dice(1 + format as u64);
    let (mut elements, mut furthest) = (0, 0f64);
    for round in 0..rounds {
        let tensor = dice.tensor(120);
        let count = 1 + dice.below(6) as usize;
        let images: Vec<_> = (0..count).map(|_| dice.image(format, 300, &tensor)).collect();
        let mut sources = Vec::new();
        for (frame, bytes, part) in &images {
            sources.push(Source { bytes: bed.upload(bytes.clone())?.whole(), frame: *frame, part: *part });
        }
        let out = bed.context.alloc(tensor.bytes() * count)?;
        bed.kernels.prepare(&bed.stream, &sources, &tensor, &out.whole())?.wait()?;
        let found = bed.download(&out)?;
        for ((frame, bytes, part), found) in images.iter().zip(found.chunks_exact(tensor.bytes())) {
            let told = |misfit| wrong(format!("{misfit}"));
            let exact = reference::exact(frame, bytes, part, &tensor).map_err(told)?;
            if found != exact {
                let at =
                    found.iter().zip(&exact).position(|(found, exact)| found != exact).unwrap_or_default();
                return Err(wrong(format!(
                    "round {round}: byte {at} is {} and not {}, of {part:?} of {frame:?} in {tensor:?}",
                    found[at], exact[at]
                )));
            }
            let real = reference::real(frame, bytes, part, &tensor).map_err(told)?;
            let mul = tensor.mul.iter().fold(0f32, |most, mul| most.max(mul.abs()));
            let pixel = if part.filter == Filter::Bilinear { 1.5 } else { 2.2 };
            for (real, found) in real.iter().zip(found.chunks_exact(tensor.dtype.size())) {
                let rounding = match tensor.dtype {
                    Dtype::U8 => 0.51,
                    Dtype::F16 => real.abs() / 2048.0,
                    Dtype::Bf16 => real.abs() / 256.0,
                    Dtype::F32 => real.abs() * 1e-6,
                };
                let off = ((f64::from(number(tensor.dtype, found)) - real).abs() - rounding - 1e-4)
                    / f64::from(mul);
                if off > pixel {
                    return Err(wrong(format!(
                        "round {round}: {off} of 255 from float64, of {part:?} of {frame:?}"
                    )));
                }
                furthest = furthest.max(off);
                elements += 1;
            }
        }
    }
    Ok(format!(
        "{rounds} batches, {elements} elements bit for bit the CPU's, at most {furthest:.2} of 255 from float64"
    ))
}

fn convert(bed: &Bed, rounds: u32) -> Result<String, Failure> {
    let mut dice = bed.dice(10);
    let mut elements = 0;
    for round in 0..rounds * 4 {
        // Every other time as pictures are: eight pixels of three channels are moved at once.
        let picture = round % 2 == 0;
        let rows = 1 + dice.below(4) as usize;
        let channels = if picture { 3 } else { 1 + dice.below(5) as usize };
        let pixels = if picture { 8 * (1 + dice.below(600) as usize) } else { 1 + dice.below(5000) as usize };
        let (from, to) = ((dice.dtype(), dice.layout()), (dice.dtype(), dice.layout()));
        let factors = (dice.below(2) == 0).then(|| {
            (0..channels)
                .map(|_| [dice.share() as f32 * 6.0 - 3.0, dice.share() as f32 * 600.0])
                .collect::<Vec<_>>()
        });
        let conversion = Conversion { rows, channels, pixels, from, to, factors };
        let bytes = dice.bytes(rows * channels * pixels * from.0.size());
        let (source, target) =
            (bed.upload(bytes.clone())?, bed.context.alloc(rows * channels * pixels * to.0.size())?);
        bed.kernels.convert(&bed.stream, &conversion, &source.whole(), &target.whole())?.wait()?;
        let found = bed.download(&target)?;
        let place = |layout: Layout, at: usize| {
            let (row, rest) = (at / (channels * pixels), at % (channels * pixels));
            let (channel, pixel) = (rest / pixels, rest % pixels);
            let planar = layout == Layout::Planar;
            let inside = if planar { channel * pixels + pixel } else { pixel * channels + channel };
            (row * channels * pixels + inside, channel)
        };
        for at in 0..rows * channels * pixels {
            let ((source, channel), (target, _)) = (place(from.1, at), place(to.1, at));
            let mut value = number(from.0, &bytes[source * from.0.size()..]);
            if let Some(factors) = &conversion.factors {
                value = value * factors[channel][0] + factors[channel][1];
            }
            let bits = match to.0 {
                Dtype::U8 => u32::from(value.round_ties_even() as u8),
                Dtype::F16 => u32::from(f16_bits(value)),
                Dtype::Bf16 => u32::from(bf16_bits(value)),
                Dtype::F32 => value.to_bits(),
            };
            let found = &found[target * to.0.size()..][..to.0.size()];
            // What a sum of NaN looks like is each machine's own.
            let same = found == &bits.to_le_bytes()[..to.0.size()]
                || to.0 != Dtype::U8 && value.is_nan() && number(to.0, found).is_nan();
            if !same {
                return Err(wrong(format!(
                    "round {round}: {value} became {found:?}, not {bits:#x}, of {conversion:?}"
                )));
            }
            elements += 1;
        }
    }
    Ok(format!("{elements} elements bit for bit the CPU's"))
}

fn rows(bed: &Bed, rounds: u32) -> Result<String, Failure> {
    let mut dice = bed.dice(11);
    for round in 0..rounds * 4 {
        let bytes = dice.one_of(&[1, 7, 64, 301, 4096, 150_528]);
        let (many, few) = (1 + dice.below(40) as usize, 1 + dice.below(20) as usize);
        let list: Vec<u32> = (0..many).map(|_| dice.below(few as u64 + 3) as u32).collect();
        let tight = |count| Rows { count, bytes, stride: bytes };
        let source = dice.bytes(few * bytes);
        let (from, to) = (bed.upload(source.clone())?, bed.upload(dice.bytes(many * bytes))?);
        let (small, big) = ((&from.whole(), tight(few)), (&to.whole(), tight(many)));
        bed.kernels.gather(&bed.stream, &list, small, big)?.wait()?;
        let gathered = bed.download(&to)?;
        for (row, index) in list.iter().enumerate() {
            let wanted = source.get(*index as usize * bytes..(*index as usize + 1) * bytes);
            let found = &gathered[row * bytes..][..bytes];
            if wanted.map_or_else(|| found.iter().any(|byte| *byte != 0), |wanted| wanted != found) {
                return Err(wrong(format!(
                    "round {round}: row {row} of a gather of {bytes} bytes is not row {index}"
                )));
            }
        }
        // And back: every row that was taken lands where it was.
        let back = bed.upload(vec![0x77; few * bytes])?;
        bed.kernels.scatter(&bed.stream, &list, big, (&back.whole(), tight(few)))?.wait()?;
        let scattered = bed.download(&back)?;
        for row in 0..few {
            let found = &scattered[row * bytes..][..bytes];
            let taken = list.contains(&(row as u32));
            let right = if taken {
                found == &source[row * bytes..][..bytes]
            } else {
                found.iter().all(|byte| *byte == 0x77)
            };
            if !right {
                return Err(wrong(format!(
                    "round {round}: row {row} of a scatter of {bytes} bytes is wrong"
                )));
            }
        }
    }
    Ok(format!("{} lists", rounds * 8))
}

/// Bytes of an arena to the device, and back into another part of it.
fn there_and_back(bed: &Bed, kind: Kind<'_>) -> Result<String, Failure> {
    const BYTES: usize = 3 << 20;
    let none = || wrong("the arena has no room");
    let arena = Arena::new(kind, 3 * BYTES, 4096)?;
    let bytes = bed.dice(12).bytes(BYTES);
    let run = arena.run(&[BYTES], 1).ok_or_else(none)?;
    let mut rows = run.rows(0, 1).ok_or_else(none)?;
    rows.write(0, 0, &bytes).map_err(|misfit| wrong(misfit.to_string()))?;
    drop(rows);
    let sent = run.seal().ok_or_else(none)?.freeze().bytes(0, 0..1).ok_or_else(none)?;
    let memory = bed.context.alloc(BYTES)?;
    let landing = arena.run(&[BYTES], 1).and_then(|run| run.seal()).ok_or_else(none)?;
    // Both on their way before either is waited for: the stream keeps the order, and the arena the bytes.
    let there = bed.stream.upload(sent, &memory, 0)?;
    let back = bed.stream.download(&memory, 0, landing, 0, 0..1)?;
    drop(there);
    let (landed, _) = back.wait()?;
    if landed.input(0, 0..1) != Some(&bytes[..]) {
        return Err(wrong("what came back is not what was sent"));
    }
    drop(landed);
    bed.context.wait()?;
    match arena.occupancy().in_use {
        0 => Ok(format!("{BYTES} bytes there and back, and the arena is free again")),
        left => Err(wrong(format!("{left} bytes of the arena are still in use"))),
    }
}

/// A second stream reads what the first writes, after it was told to wait.
fn order(bed: &Bed, rounds: u32) -> Result<String, Failure> {
    const BYTES: usize = 8 << 20;
    let other = bed.context.stream()?;
    let (first, second) = (bed.context.alloc(BYTES)?, bed.context.alloc(BYTES)?);
    for round in 0..rounds {
        let byte = round as u8 | 1;
        let filling = bed.stream.fill(&first, 0..BYTES, byte)?;
        other.after(&bed.stream.mark()?)?;
        other.copy(&first, 0..BYTES, &second, 0)?.wait()?;
        filling.wait()?;
        if bed.download(&second)?.iter().any(|found| *found != byte) {
            return Err(wrong(format!("round {round}: the copy came before what it copies")));
        }
    }
    Ok(format!("{rounds} times"))
}
