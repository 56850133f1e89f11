//! How fast copies and kernels are, beside a bare copy of the same device in the same run. Times are the device's own.

use bytes::Bytes;
use penstock_kernels::arena::{Access, Arena, Kind};
use penstock_kernels::cuda::{Conversion, DeviceMemory, Pending, Rows, Source, Stream};
use penstock_kernels::fused::{Area, Format, Frame, Part, Tensor};
use penstock_kernels::normalise::{Channels, Dtype, Layout};

use crate::bed::{Bed, Failure, wrong};

/// A slot of the arena: a tensor of 6 MiB, as docs/DATAPATH.md has them.
const SLOT: usize = 6 << 20;

/// Sizes for a GPU, and for the STAND-IN, which is none.
struct Sizes {
    copy: usize,
    batch: usize,
    /// Runs of each measurement, of which the median counts.
    runs: usize,
    /// Launches of a run, one behind the other: by itself one would be shorter than it takes to start it.
    launches: usize,
}

/// Seconds of the device for what `work` starts, the median of some runs.
fn seconds(
    sizes: &Sizes,
    stream: &Stream,
    mut work: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    work()?;
    let mut times = Vec::with_capacity(sizes.runs);
    for _ in 0..sizes.runs {
        let begin = stream.mark()?;
        work()?;
        times.push(f64::from(stream.mark()?.milliseconds_since(&begin)?) / 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[sizes.runs / 2].max(1e-9))
}

/// The same, of one launch among several.
fn seconds_each(
    sizes: &Sizes,
    stream: &Stream,
    mut launch: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let all = seconds(sizes, stream, || (0..sizes.launches).try_for_each(|_| launch()))?;
    Ok(all / sizes.launches as f64)
}

/// One line: so many bytes in so many seconds, beside a rate.
fn line(name: &str, bytes: usize, seconds: f64, beside: Option<(&str, f64)>) -> f64 {
    let rate = bytes as f64 / seconds / 1e9;
    match beside {
        Some((what, other)) => {
            println!("{name:<58}{rate:>9.2} GB/s  {:>6.1} % of {what}", 100.0 * rate / other);
        }
        None => println!("{name:<58}{rate:>9.2} GB/s"),
    }
    rate
}

/// Prints them all.
pub(crate) fn table(bed: &Bed, standin: bool) -> Result<(), Failure> {
    let sizes = if standin {
        Sizes { copy: 12 << 20, batch: 1, runs: 1, launches: 1 }
    } else {
        Sizes { copy: 240 << 20, batch: 64, runs: 7, launches: 10 }
    };
    if standin {
        println!("STAND-IN: rates of this CPU, which say nothing about a GPU");
    }
    host(bed, &sizes)?;
    let copy = device(bed, &sizes)?;
    kernels(bed, &sizes, copy)?;
    overlap(bed, &sizes)
}

fn filled(arena: &Arena, bytes: usize) -> Result<Bytes, Failure> {
    let none = || wrong("the arena has no room");
    let sealed = arena.run(&[bytes], 1).and_then(|run| run.seal()).ok_or_else(none)?;
    sealed.freeze().bytes(0, 0..1).ok_or_else(none)
}

/// Host and device: one bare copy, and the same bytes slot by slot as the sidecar sends them.
fn host(bed: &Bed, sizes: &Sizes) -> Result<(), Failure> {
    let Bed { context, stream, .. } = bed;
    let memory = context.alloc(sizes.copy)?;
    let arena = Arena::new(Kind::Pinned { context }, sizes.copy, 4096)?;
    let all = filled(&arena, sizes.copy)?;
    let time = seconds(sizes, stream, || aloft(stream.upload(all.clone(), &memory, 0)))?;
    let bare = line("host to device, pinned, one bare copy", sizes.copy, time, None);
    let slots = |all: &Bytes| {
        for at in (0..sizes.copy).step_by(SLOT) {
            aloft(stream.upload(all.slice(at..at + SLOT), &memory, at))?;
        }
        Ok(())
    };
    let time = seconds(sizes, stream, || slots(&all))?;
    line("host to device, pinned, slots of 6 MiB", sizes.copy, time, Some(("the bare copy", bare)));
    drop(all);
    let (node, name, access) = ("gpu-test", "rates", Access::Group(None));
    match Arena::new(Kind::Registered { context, node, name, access }, sizes.copy, 4096) {
        Ok(arena) => {
            let all = filled(&arena, sizes.copy)?;
            let time = seconds(sizes, stream, || slots(&all))?;
            line(
                "host to device, shared and registered, slots of 6 MiB",
                sizes.copy,
                time,
                Some(("the bare copy", bare)),
            );
        }
        Err(error) => println!("host to device, shared and registered: not measured: {error}"),
    }
    let heap = Bytes::from(vec![1; sizes.copy]);
    let time = seconds(sizes, stream, || slots(&heap))?;
    line("host to device, pageable, slots of 6 MiB", sizes.copy, time, Some(("the bare copy", bare)));
    let landing = arena.run(&[sizes.copy], 1).and_then(|run| run.seal());
    let mut landing = Some(landing.ok_or_else(|| wrong("the arena has no room"))?);
    let time = seconds(sizes, stream, || {
        let sealed = landing.take().ok_or_else(|| wrong("nowhere to land"))?;
        landing = Some(stream.download(&memory, 0, sealed, 0, 0..1)?.wait()?.0);
        Ok(())
    })?;
    line("device to host, pinned, one bare copy", sizes.copy, time, None);
    Ok(())
}

/// What was started stays with the context, and need not be waited for piece by piece.
fn aloft<T: Send + 'static>(started: Result<Pending<T>, impl Into<Failure>>) -> Result<(), Failure> {
    started.map(drop).map_err(Into::into)
}

/// The device's own copy rate, reads and writes counted.
fn device(bed: &Bed, sizes: &Sizes) -> Result<f64, Failure> {
    let (from, to) = (bed.context.alloc(sizes.copy)?, bed.context.alloc(sizes.copy)?);
    let time = seconds_each(sizes, &bed.stream, || aloft(bed.stream.copy(&from, 0..sizes.copy, &to, 0)))?;
    Ok(line("device to device, reads and writes", 2 * sizes.copy, time, None))
}

/// A 1080p frame as a classifier takes it.
fn photograph(bed: &Bed, format: Format) -> Result<(DeviceMemory, Frame, Part, Tensor), Failure> {
    let frame = Frame::tight(format, 1920, 1080);
    let memory = bed.upload(bed.dice(30).bytes(frame.bytes().unwrap_or_default()))?;
    let scale = 1080.0 / 256.0;
    let area = Area { left: 116.0 * scale, top: 16.0 * scale, width: 224.0 * scale, height: 224.0 * scale };
    let part = Part { area, ..Part::whole(&frame, (224, 224)) };
    let tensor = Tensor {
        width: 224,
        height: 224,
        channels: Channels::Rgb,
        layout: Layout::Planar,
        dtype: Dtype::F16,
        mul: [0.017_124_754, 0.017_507_002, 0.017_429_193],
        add: [-2.117_904, -2.035_714_3, -1.804_444_4],
    };
    Ok((memory, frame, part, tensor))
}

fn kernels(bed: &Bed, sizes: &Sizes, copy: f64) -> Result<(), Failure> {
    let beside = Some(("the device's copy", copy));
    for (name, format, pixel) in [("RGB", Format::Rgb, 3.0), ("NV12", Format::Nv12, 1.5)] {
        let batch = sizes.batch;
        let (_, frame, part, tensor) = photograph(bed, format)?;
        // Each image in memory of its own: one for all would stay in the cache.
        let mut sources = Vec::new();
        for _ in 0..batch {
            sources.push(Source { bytes: photograph(bed, format)?.0.whole(), frame, part });
        }
        let out = bed.context.alloc(tensor.bytes() * batch)?;
        let time = seconds_each(sizes, &bed.stream, || {
            aloft(bed.kernels.prepare(&bed.stream, &sources, &tensor, &out.whole()))
        })?;
        // What is inside of the crop, read once, and the tensor, written once.
        let bytes = (part.area.width * part.area.height * pixel) as usize + tensor.bytes();
        line(&format!("prepare: {batch} x 1080p {name} to f16 CHW 224"), bytes * batch, time, beside);
        println!("{:<58}{:>9.1} us an image", "", time * 1e6 / batch as f64);
    }
    let elements = sizes.copy / 4;
    let (from, to) = (bed.context.alloc(sizes.copy)?, bed.context.alloc(sizes.copy)?);
    let pixels = elements / 3;
    let planar = |dtype| (dtype, Layout::Planar);
    let rows = [
        ("convert: f32 to f16, order kept", planar(Dtype::F32), planar(Dtype::F16)),
        ("convert: u8 to f16, order kept, normalised", planar(Dtype::U8), planar(Dtype::F16)),
        ("convert: u8 HWC to f16 CHW, normalised", (Dtype::U8, Layout::Interleaved), planar(Dtype::F16)),
    ];
    for (name, source, target) in rows {
        let factors = (source.0 == Dtype::U8).then(|| vec![[0.017, -2.0]; 3]);
        let conversion = Conversion { rows: 1, channels: 3, pixels, from: source, to: target, factors };
        let time = seconds_each(sizes, &bed.stream, || {
            aloft(bed.kernels.convert(&bed.stream, &conversion, &from.whole(), &to.whole()))
        })?;
        line(name, 3 * pixels * (source.0.size() + target.0.size()), time, beside);
    }
    let bytes = 301_056;
    let count = sizes.copy / bytes;
    let tight = Rows { count, bytes, stride: bytes };
    let list: Vec<u32> = (0..count as u32).rev().collect();
    let time = seconds_each(sizes, &bed.stream, || {
        aloft(bed.kernels.gather(&bed.stream, &list, (&from.whole(), tight), (&to.whole(), tight)))
    })?;
    line("gather: rows of 301,056 bytes", 2 * count * bytes, time, beside);
    Ok(())
}

/// Copies on one stream while kernels run on another, against one after the other.
fn overlap(bed: &Bed, sizes: &Sizes) -> Result<(), Failure> {
    let Bed { context, stream, kernels, .. } = bed;
    let other = context.stream()?;
    let arena = Arena::new(Kind::Pinned { context }, sizes.copy, 4096)?;
    let all = filled(&arena, sizes.copy)?;
    let memory = context.alloc(sizes.copy)?;
    let (source, frame, part, tensor) = photograph(bed, Format::Rgb)?;
    let sources = vec![Source { bytes: source.whole(), frame, part }; sizes.batch];
    let out = context.alloc(tensor.bytes() * sizes.batch)?;
    let copies = || aloft(stream.upload(all.clone(), &memory, 0));
    let copy = seconds(sizes, stream, copies)?;
    let kernel = || aloft(kernels.prepare(&other, &sources, &tensor, &out.whole()));
    let once = seconds(sizes, &other, kernel)?;
    // About as long as the copy, so that there is something to hide.
    let times = (copy / once).clamp(1.0, 64.0) as usize;
    let alone = seconds(sizes, &other, || (0..times).try_for_each(|_| kernel()))?;
    let both = seconds(sizes, stream, || {
        // The copy first: launches are many calls, in which it would have to wait for its own.
        other.after(&stream.mark()?)?;
        copies()?;
        (0..times).try_for_each(|_| kernel())?;
        Ok(stream.after(&other.mark()?)?)
    })?;
    let hidden = 100.0 * (copy + alone - both) / copy.min(alone);
    println!(
        "overlap: copy {:.2} ms, kernels {:.2} ms, together {:.2} ms: {hidden:.0} % of the shorter is hidden",
        copy * 1e3,
        alone * 1e3,
        both * 1e3
    );
    Ok(())
}
