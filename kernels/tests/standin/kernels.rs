//! What the kernels compute: bit for bit what the CPU does, and nearly what the definitions say.

use bytes::Bytes;
use penstock_kernels::arena::{Arena, Kind};
use penstock_kernels::cuda::{Context, Conversion, Kernels, Order, Rows, Source, Stream};
use penstock_kernels::fused::{Area, Filter, Format, Frame, Matrix, Part, Range, Tensor, Turn, reference};
use penstock_kernels::normalise::{
    Channels, Dtype, Layout, Normaliser, Pixels, Place, bf16_bits, f16_bits, f32_of_bf16, f32_of_f16,
};
use proptest::prelude::*;

use crate::driver::StandIn;

/// A device, ready to launch.
struct Bed {
    standin: StandIn,
    context: Context,
    stream: Stream,
    kernels: Kernels,
}

impl Bed {
    fn new(script: &str) -> Self {
        let standin = StandIn::new(script);
        let context = standin.context();
        let stream = context.stream().unwrap();
        let kernels = Kernels::load(&context).unwrap();
        Self { standin, context, stream, kernels }
    }

    fn upload(&self, bytes: Vec<u8>) -> penstock_kernels::cuda::DeviceMemory {
        let memory = self.context.alloc(bytes.len()).unwrap();
        self.stream.upload(Bytes::from(bytes), &memory, 0).unwrap().wait().unwrap();
        memory
    }

    fn download(&self, memory: &penstock_kernels::cuda::DeviceMemory) -> Vec<u8> {
        let arena = Arena::new(Kind::Heap, memory.bytes(), 4096).unwrap();
        let run = arena.run(&[memory.bytes()], 1).unwrap().seal().unwrap();
        let (run, _) = self.stream.download(memory, 0, run, 0, 0..1).unwrap().wait().unwrap();
        run.input(0, 0..1).unwrap().to_vec()
    }

    /// A batch by the kernel; memory behind it stays as it was.
    fn prepare(&self, images: &[(Frame, Vec<u8>, Part)], tensor: &Tensor) -> Vec<u8> {
        const BEHIND: usize = 64;
        let sources: Vec<Source> = images
            .iter()
            .map(|(frame, bytes, part)| {
                let bytes = self.upload(bytes.clone()).whole();
                Source { bytes, frame: *frame, part: *part }
            })
            .collect();
        let needed = tensor.bytes() * images.len();
        let out = self.upload(vec![0x5a; needed + BEHIND]);
        let span = out.span(0..needed).unwrap();
        self.kernels.prepare(&self.stream, &sources, tensor, &span).unwrap().wait().unwrap();
        let mut out = self.download(&out);
        assert_eq!(out.split_off(needed), [0x5a; BEHIND]);
        out
    }
}

fn expected(images: &[(Frame, Vec<u8>, Part)], tensor: &Tensor) -> Vec<u8> {
    let exact =
        |(frame, bytes, part): &(Frame, Vec<u8>, Part)| reference::exact(frame, bytes, part, tensor).unwrap();
    images.iter().flat_map(exact).collect()
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 56) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// The numbers of a tensor's bytes.
fn numbers(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    let half = |le: &[u8]| u16::from_le_bytes([le[0], le[1]]);
    let number = |le: &[u8]| match dtype {
        Dtype::U8 => f32::from(le[0]),
        Dtype::F16 => f32_of_f16(half(le)),
        Dtype::Bf16 => f32_of_bf16(half(le)),
        Dtype::F32 => f32::from_le_bytes([le[0], le[1], le[2], le[3]]),
    };
    bytes.chunks_exact(dtype.size()).map(|le| f64::from(number(le))).collect()
}

/// In bytes of a pixel, as in docs/PIPELINES.md: three roundings of the bilinear filter, and more where lobes are
/// negative. The result's own datatype rounds once more.
fn allowed(filter: Filter, tensor: &Tensor, value: f64) -> f64 {
    let pixel = if filter == Filter::Bilinear { 1.5 } else { 2.2 };
    let most = tensor.mul.iter().fold(0f64, |most, mul| most.max(f64::from(mul.abs())));
    let rounding = match tensor.dtype {
        Dtype::U8 => 0.51,
        Dtype::F16 => value.abs() / 2048.0 + 1e-4,
        Dtype::Bf16 => value.abs() / 256.0 + 1e-4,
        Dtype::F32 => value.abs() * 1e-6 + 1e-4,
    };
    pixel * most + rounding
}

fn one_of<T: Clone + std::fmt::Debug + 'static>(values: &[T]) -> impl Strategy<Value = T> + use<T> {
    prop::sample::select(values.to_vec())
}

const FORMATS: [Format; 4] = [Format::Rgb, Format::Gray, Format::Nv12, Format::I420];

fn frame(format: Format, most: u32) -> impl Strategy<Value = (Frame, Vec<u8>)> {
    let side = move || prop_oneof![1 => Just(1u32), 6 => 1..=most];
    let gaps = prop::array::uniform3(0usize..9);
    let video = (one_of(&[Matrix::Bt601, Matrix::Bt709]), one_of(&[Range::Limited, Range::Full]));
    (side(), side(), gaps, 0u32..7, video, any::<u64>()).prop_map(
        move |(width, height, gaps, odd, video, seed)| {
            let tight = Frame::tight(format, width, height);
            let rows = [u64::from(height), u64::from(height.div_ceil(2)), u64::from(height.div_ceil(2))];
            let strides = tight.strides.map(|stride| stride + odd);
            let mut planes = [gaps[0], 0, 0];
            for at in 1..3 {
                let before = rows[at - 1] as usize * strides[(at - 1).min(1)] as usize;
                planes[at] = planes[at - 1] + before + gaps[at];
            }
            let frame = Frame { planes, strides, matrix: video.0, range: video.1, ..tight };
            let bytes = noise(frame.bytes().unwrap(), seed);
            (frame, bytes)
        },
    )
}

fn part(frame: Frame, width: u32, height: u32) -> impl Strategy<Value = Part> {
    let size = (1..=width.min(height), 1..=width.min(height));
    let area = prop_oneof![
        // All of it, whole pixels of it, and any part of it.
        Just([0.0, 0.0, 1.0, 1.0]),
        prop::array::uniform4(0.0f64..1.0),
    ];
    let turn = prop::array::uniform3(any::<bool>());
    let filter = one_of(&[Filter::Bilinear, Filter::Bicubic, Filter::Lanczos]);
    let room = (0.0f64..=1.0, 0.0f64..=1.0);
    (size, area, any::<bool>(), turn, filter, any::<bool>(), room, any::<[u8; 3]>()).prop_map(
        move |(mut size, share, whole, turn, filter, antialias, room, pad)| {
            let (all, down) = (f64::from(frame.width), f64::from(frame.height));
            let mut area = Area {
                left: share[0] * all * 0.9,
                top: share[1] * down * 0.9,
                width: (share[2] * all).max(0.05),
                height: (share[3] * down).max(0.05),
            };
            if whole {
                area.left = area.left.floor();
                area.top = area.top.floor();
                size =
                    (size.0.min(frame.width - area.left as u32), size.1.min(frame.height - area.top as u32));
                (area.width, area.height) = (f64::from(size.0), f64::from(size.1));
            }
            area.width = area.width.min(all - area.left);
            area.height = area.height.min(down - area.top);
            let [transposed, mirrored, flipped] = turn;
            let turn = Turn { transposed, mirrored, flipped };
            let upright = if transposed { (size.1, size.0) } else { size };
            let at = |share: f64, all: u32, used: u32| (share * f64::from(all - used)) as u32;
            let at = (at(room.0, width, upright.0), at(room.1, height, upright.1));
            Part { area, size, turn, at, filter, antialias, pad }
        },
    )
}

fn tensor() -> impl Strategy<Value = Tensor> {
    let channels = one_of(&[Channels::Rgb, Channels::Bgr, Channels::Gray]);
    let layout = one_of(&[Layout::Planar, Layout::Interleaved]);
    let dtype = one_of(&[Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32]);
    let factors = prop::array::uniform3((0.001f32..1.5, -120f32..120.0));
    (1u32..80, 1u32..40, channels, layout, dtype, factors).prop_map(
        |(width, height, channels, layout, dtype, factors)| Tensor {
            width,
            height,
            channels,
            layout,
            dtype,
            mul: factors.map(|both| both.0),
            add: factors.map(|both| both.1),
        },
    )
}

fn batch() -> impl Strategy<Value = (Vec<(Frame, Vec<u8>, Part)>, Tensor)> {
    (tensor(), one_of(&FORMATS)).prop_flat_map(|(tensor, format)| {
        let image = frame(format, 70).prop_flat_map(move |(frame, bytes)| {
            part(frame, tensor.width, tensor.height).prop_map(move |part| (frame, bytes.clone(), part))
        });
        (prop::collection::vec(image, 1..4), Just(tensor))
    })
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() }
}

#[test]
fn a_batch_of_any_images_has_the_bits_of_the_cpu_and_nearly_those_of_float64() {
    let beds = [Bed::new(""), Bed::new("backward")];
    proptest!(cases(400), |((images, tensor) in batch())| {
        let wanted = expected(&images, &tensor);
        for bed in &beds {
            let found = bed.prepare(&images, &tensor);
            prop_assert!(found == wanted, "{images:?} {tensor:?}");
        }
        for ((frame, bytes, part), exact) in images.iter().zip(wanted.chunks_exact(tensor.bytes())) {
            let real = reference::real(frame, bytes, part, &tensor).unwrap();
            for (real, exact) in real.into_iter().zip(numbers(tensor.dtype, exact)) {
                let allowed = allowed(part.filter, &tensor, real);
                prop_assert!((real - exact).abs() <= allowed, "{exact} is not {real}: {part:?} {tensor:?}");
            }
        }
    });
}

const IMAGENET: Tensor = Tensor {
    width: 224,
    height: 224,
    channels: Channels::Rgb,
    layout: Layout::Planar,
    dtype: Dtype::F16,
    mul: [0.017_124_754, 0.017_507_002, 0.017_429_193],
    add: [-2.117_904, -2.035_714_3, -1.804_444_4],
};

#[test]
fn a_source_that_is_too_wide_for_a_strip_is_worked_off_in_steps() {
    let bed = Bed::new("");
    // 32 pixels of the result need 9,600 columns of the source, of which 512 fit at once.
    let tensor = Tensor { width: 40, height: 9, ..IMAGENET };
    for (format, transposed) in FORMATS.into_iter().zip([false, true, false, true]) {
        let frame = Frame::tight(format, 12_000, 37);
        let bytes = noise(frame.bytes().unwrap(), 7);
        let size = if transposed { (9, 40) } else { (40, 9) };
        let turn = Turn { transposed, mirrored: true, flipped: false };
        let part = Part { size, turn, filter: Filter::Lanczos, ..Part::whole(&frame, size) };
        let images = [(frame, bytes, part)];
        assert_eq!(bed.prepare(&images, &tensor), expected(&images, &tensor), "{format:?}");
    }
}

#[test]
fn a_batch_of_differently_sized_photographs_is_one_launch() {
    let bed = Bed::new("");
    let sizes = [(640, 480), (333, 500), (224, 224), (1, 1), (1281, 719)];
    let images: Vec<(Frame, Vec<u8>, Part)> = sizes
        .into_iter()
        .map(|(width, height)| {
            let frame = Frame::tight(Format::Rgb, width, height);
            let bytes = noise(frame.bytes().unwrap(), u64::from(width));
            (frame, bytes, Part::whole(&frame, (224, 224)))
        })
        .collect();
    bed.standin.log();
    let found = bed.prepare(&images, &IMAGENET);
    let launches =
        bed.standin.log().into_iter().filter(|line| line.starts_with("cuLaunchKernel")).collect::<Vec<_>>();
    // Its tables are fetched first.
    assert!(launches[0].ends_with(" block=[256, 1, 1]"), "{launches:?}");
    assert_eq!(launches[1..], ["cuLaunchKernel grid=[7, 28, 5] block=[32, 8, 1]"]);
    assert_eq!(found, expected(&images, &IMAGENET));
}

#[test]
fn an_image_that_keeps_its_size_is_what_the_normaliser_makes_of_it() {
    let bed = Bed::new("");
    for (dtype, layout) in
        [(Dtype::F16, Layout::Planar), (Dtype::U8, Layout::Interleaved), (Dtype::Bf16, Layout::Planar)]
    {
        let tensor = Tensor { width: 61, height: 33, dtype, layout, ..IMAGENET };
        let frame = Frame::tight(Format::Rgb, 61, 33);
        let bytes = noise(frame.bytes().unwrap(), 3);
        let normaliser = Normaliser::new(Channels::Rgb, layout, dtype, tensor.mul, tensor.add);
        let mut wanted = vec![0; tensor.bytes()];
        let pixels = Pixels { bytes: &bytes, stride: 183, width: 61, height: 33, channels: 3 };
        normaliser.run(&pixels, &Place::all(61, 33), &mut wanted).unwrap();
        let images = [(frame, bytes, Part::whole(&frame, (61, 33)))];
        assert_eq!(bed.prepare(&images, &tensor), wanted);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_launched() {
    let bed = Bed::new("");
    let frame = Frame::tight(Format::Rgb, 10, 10);
    let memory = bed.upload(vec![0; 300]);
    let out = bed.context.alloc(IMAGENET.bytes()).unwrap();
    let source = |part, span| Source { bytes: span, frame, part };
    let whole = Part::whole(&frame, (224, 224));
    let far = Part { area: Area { left: 5.0, width: 6.0, ..whole.area }, ..whole };
    let large = Part { at: (1, 0), ..whole };
    let cases = [
        (
            source(whole, memory.span(0..299).unwrap()),
            "image 0 of 1: the frame needs 300 bytes, but there are 299",
        ),
        (source(far, memory.whole()), "image 0 of 1: Area { left: 5.0"),
        (source(large, memory.whole()), "image 0 of 1: (224, 224) at (1, 0) leaves a tensor of 224 x 224"),
        (
            Source { frame: Frame { width: 0, ..frame }, ..source(whole, memory.whole()) },
            "image 0 of 1: Frame",
        ),
        (
            Source { frame: Frame { strides: [29, 0], ..frame }, ..source(whole, memory.whole()) },
            "image 0 of 1: Frame",
        ),
    ];
    for (source, told) in cases {
        let order = bed.kernels.prepare(&bed.stream, &[source], &IMAGENET, &out.whole()).unwrap_err();
        assert!(order.to_string().starts_with(told), "{order}");
    }
    let good = source(whole, memory.whole());
    let short = out.span(2..IMAGENET.bytes()).unwrap();
    let order = bed.kernels.prepare(&bed.stream, std::slice::from_ref(&good), &IMAGENET, &short).unwrap_err();
    assert!(
        order.to_string().starts_with("the batch needs 301056 bytes at a multiple of 2, and has 301054"),
        "{order}"
    );
    assert_eq!(bed.kernels.prepare(&bed.stream, &[], &IMAGENET, &out.whole()).unwrap_err(), Order::Count(0));
    let gray = Source { frame: Frame::tight(Format::Gray, 10, 10), ..good.clone() };
    let order = bed.kernels.prepare(&bed.stream, &[good, gray], &IMAGENET, &out.whole()).unwrap_err();
    assert_eq!(order, Order::Formats);
    // Another device's kernels do not belong on this one's stream.
    let other = Bed::new("");
    let elsewhere =
        other.kernels.prepare(&bed.stream, &[source(whole, memory.whole())], &IMAGENET, &out.whole());
    assert_eq!(elsewhere.unwrap_err(), Order::Device);
    bed.standin.log().iter().for_each(|line| assert!(!line.starts_with("cuLaunchKernel")));
}

/// A tensor to another, as the definition says it.
fn converted(conversion: &Conversion, bytes: &[u8]) -> Vec<u8> {
    let Conversion { rows, channels, pixels, from, to, factors } = conversion;
    let place = |layout: Layout, row: usize, channel: usize, pixel: usize| match layout {
        Layout::Planar => (row * channels + channel) * pixels + pixel,
        Layout::Interleaved => (row * pixels + pixel) * channels + channel,
    };
    let mut out = vec![0; rows * channels * pixels * to.0.size()];
    for (row, channel, pixel) in (0..*rows).flat_map(|row| {
        (0..*channels).flat_map(move |channel| (0..*pixels).map(move |pixel| (row, channel, pixel)))
    }) {
        let at = place(from.1, row, channel, pixel) * from.0.size();
        let le = &bytes[at..at + from.0.size()];
        let half = || u16::from_le_bytes([le[0], le[1]]);
        let mut value = match from.0 {
            Dtype::U8 => f32::from(le[0]),
            Dtype::F16 => f32_of_f16(half()),
            Dtype::Bf16 => f32_of_bf16(half()),
            Dtype::F32 => f32::from_le_bytes([le[0], le[1], le[2], le[3]]),
        };
        if let Some(factors) = factors {
            value = value * factors[channel][0] + factors[channel][1];
        }
        let at = place(to.1, row, channel, pixel) * to.0.size();
        let out = &mut out[at..at + to.0.size()];
        match to.0 {
            Dtype::U8 => out[0] = value.round_ties_even() as u8,
            Dtype::F16 => out.copy_from_slice(&f16_bits(value).to_le_bytes()),
            Dtype::Bf16 => out.copy_from_slice(&bf16_bits(value).to_le_bytes()),
            Dtype::F32 => out.copy_from_slice(&value.to_le_bytes()),
        }
    }
    out
}

#[test]
fn a_tensor_of_any_bits_becomes_another_to_the_bit() {
    let bed = Bed::new("");
    let dtype = || one_of(&[Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32]);
    let layout = || one_of(&[Layout::Planar, Layout::Interleaved]);
    // Eight pixels of three channels are moved at once.
    let shape = prop_oneof![
        (1usize..4, 1usize..6, 1usize..700),
        (1usize..4, Just(3usize), (1usize..90).prop_map(|eights| 8 * eights)),
    ];
    let factors = prop::option::of(prop::collection::vec((-3f32..3.0, -300f32..300.0), 6));
    proptest!(cases(300), |(shape in shape, dtypes in (dtype(), dtype()), layouts in (layout(), layout()), factors in factors, skipped in (0usize..2, 0usize..2), seed: u64)| {
        let (rows, channels, pixels) = shape;
        let factors = factors.map(|of| of.into_iter().take(channels).map(|(mul, add)| [mul, add]).collect());
        let (from, to) = ((dtypes.0, layouts.0), (dtypes.1, layouts.1));
        let conversion = Conversion { rows, channels, pixels, from, to, factors };
        let bytes = noise(rows * channels * pixels * from.0.size(), seed);
        let wanted = converted(&conversion, &bytes);
        // Where a tensor does not begin at a multiple of 16 bytes its elements are moved one by one.
        let skipped = (skipped.0 * from.0.size(), skipped.1 * to.0.size());
        let source = bed.upload([vec![0; skipped.0], bytes].concat());
        let target = bed.context.alloc(skipped.1 + wanted.len()).unwrap();
        let (source, into) = (source.span(skipped.0..source.bytes()), target.span(skipped.1..target.bytes()));
        bed.kernels.convert(&bed.stream, &conversion, &source.unwrap(), &into.unwrap()).unwrap().wait().unwrap();
        prop_assert!(bed.download(&target)[skipped.1..] == wanted, "{conversion:?} {skipped:?}");
    });
}

#[test]
fn every_half_comes_back_as_itself() {
    let bed = Bed::new("");
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let go = |from: Dtype, to: Dtype, bytes: Vec<u8>| {
            let (from, to) = ((from, Layout::Planar), (to, Layout::Planar));
            let conversion = Conversion { rows: 1, channels: 1, pixels: 1 << 16, from, to, factors: None };
            let (source, target) = (bed.upload(bytes), bed.context.alloc(to.0.size() << 16).unwrap());
            bed.kernels
                .convert(&bed.stream, &conversion, &source.whole(), &target.whole())
                .unwrap()
                .wait()
                .unwrap();
            bed.download(&target)
        };
        let back = go(Dtype::F32, dtype, go(dtype, Dtype::F32, bytes.clone()));
        for (at, (found, wanted)) in back.chunks_exact(2).zip(bytes.chunks_exact(2)).enumerate() {
            let nan = numbers(dtype, wanted)[0].is_nan();
            assert!(found == wanted || nan && numbers(dtype, found)[0].is_nan(), "{dtype:?} {at:#x}");
        }
    }
}

#[test]
fn rows_go_where_the_list_says() {
    let bed = Bed::new("");
    let list = prop::collection::vec(0u32..9, 1..12);
    let bytes = prop_oneof![1usize..40, Just(64usize), Just(4096usize), Just(5008usize)];
    proptest!(cases(200), |(list in list, bytes in bytes, gaps in (0usize..3, 0usize..3, 0usize..3), count in 1usize..9, seed: u64)| {
        // Gaps of 16 bytes now and then, so that wide units have their turn.
        let step = if bytes % 16 == 0 { 16 } else { 1 };
        let (many, few) = (list.len(), count);
        let rows = |count, gap: usize| Rows { count, bytes, stride: bytes + gap * step };
        let lead = gaps.2 * step;
        let (big, small) = (rows(many, gaps.0), rows(few, gaps.1));
        let size = |rows: Rows| lead + rows.count * rows.stride;
        let part = |memory: &penstock_kernels::cuda::DeviceMemory| memory.span(lead..memory.bytes()).unwrap();
        let old = noise(size(big), seed ^ 1);

        let (source, target) = (noise(size(small), seed), old.clone());
        let (from, to) = (bed.upload(source.clone()), bed.upload(target.clone()));
        bed.kernels.gather(&bed.stream, &list, (&part(&from), small), (&part(&to), big)).unwrap().wait().unwrap();
        let mut wanted = target;
        for (row, index) in list.iter().enumerate() {
            let to = &mut wanted[lead + row * big.stride..][..bytes];
            match *index as usize {
                index if index < few => to.copy_from_slice(&source[lead + index * small.stride..][..bytes]),
                _ => to.fill(0),
            }
        }
        prop_assert!(bed.download(&to) == wanted);

        // Each row once: which of two wins is not said.
        let mut once = list.clone();
        once.sort_unstable();
        once.dedup();
        let (from, to) = (bed.upload(old.clone()), bed.upload(source.clone()));
        bed.kernels.scatter(&bed.stream, &once, (&part(&from), big), (&part(&to), small)).unwrap().wait().unwrap();
        let mut wanted = source;
        for (row, index) in once.iter().enumerate().filter(|(_, index)| (**index as usize) < few) {
            let from = &old[lead + row * big.stride..][..bytes];
            wanted[lead + *index as usize * small.stride..][..bytes].copy_from_slice(from);
        }
        prop_assert!(bed.download(&to) == wanted);
    });
}
