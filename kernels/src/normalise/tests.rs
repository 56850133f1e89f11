use super::*;

const DTYPES: [Dtype; 4] = [Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32];
/// ImageNet's, and one that leaves the range of a byte on both sides.
const FACTORS: [([f32; 3], [f32; 3]); 2] = [
    ([0.017_124_753, 0.017_507_003, 0.017_429_193], [-2.117_904, -2.035_714_4, -1.804_444_4]),
    ([2.5, 1.0, -1.5], [-100.0, 0.0, 300.25]),
];

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// The bytes of a tensor, one element at a time and from the definition.
fn by_hand(normaliser: &Normaliser, pixels: &Pixels<'_>) -> Vec<u8> {
    let count = normaliser.channels.count();
    let mut elements = Vec::new();
    let element = |x: usize, y: usize, channel: usize| {
        let pixel = &pixels.bytes[y * pixels.stride + x * pixels.channels..][..pixels.channels];
        let value = match (pixel, normaliser.channels) {
            ([gray], _) => *gray,
            ([red, green, blue], Channels::Gray) => {
                let luma = 0.299 * f64::from(*red) + 0.587 * f64::from(*green) + 0.114 * f64::from(*blue);
                let fixed = gray([*red, *green, *blue]);
                assert!((luma - f64::from(fixed)).abs() < 0.51, "{luma} became {fixed}");
                fixed
            }
            (pixel, Channels::Bgr) => pixel[2 - channel],
            (pixel, _) => pixel[channel],
        };
        convert::bits(normaliser.dtype, f32::from(value) * normaliser.mul[channel] + normaliser.add[channel])
    };
    let (width, height) = (pixels.width, pixels.height);
    match normaliser.layout {
        Layout::Planar => {
            for channel in 0..count {
                elements.extend((0..width * height).map(|at| element(at % width, at / width, channel)));
            }
        }
        Layout::Interleaved => {
            for at in 0..width * height {
                elements.extend((0..count).map(|channel| element(at % width, at / width, channel)));
            }
        }
    }
    let size = normaliser.dtype.size();
    elements.iter().flat_map(|bits| bits.to_le_bytes()[..size].to_vec()).collect()
}

#[test]
fn both_ways_give_the_bits_of_the_definition() {
    for dtype in DTYPES {
        for layout in [Layout::Planar, Layout::Interleaved] {
            for wanted in [Channels::Rgb, Channels::Bgr, Channels::Gray] {
                for channels in [1, 3] {
                    for (mul, add) in FACTORS {
                        for width in [1, 2, 7, 8, 9, 16, 37] {
                            let stride = width * channels + 5 * (width % 2);
                            let bytes = noise(stride * 3);
                            let pixels = Pixels { bytes: &bytes, stride, width, height: 3, channels };
                            let normaliser = Normaliser::new(wanted, layout, dtype, mul, add);
                            let expected = by_hand(&normaliser, &pixels);
                            for way in [Way::Table, Way::Vector] {
                                let normaliser = normaliser.clone().by(way);
                                let mut tensor = vec![0xaa; normaliser.bytes(width, 3)];
                                normaliser.run(&pixels, &Place::all(width, 3), &mut tensor).unwrap();
                                assert_eq!(tensor, expected, "{normaliser:?} of {width} x 3 by {way:?}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_rectangle_is_written_and_nothing_around_it() {
    for layout in [Layout::Planar, Layout::Interleaved] {
        let normaliser = Normaliser::new(Channels::Rgb, layout, Dtype::F32, [1.0; 3], [0.0; 3]);
        let (width, height) = (300, 5);
        let mut tensor = vec![0; normaliser.bytes(width, height)];
        normaliser.fill([1, 2, 3], width, height, &Place::all(width, height), &mut tensor).unwrap();
        let bytes = noise(290 * 3 * 2);
        let pixels = Pixels { bytes: &bytes, stride: 290 * 3, width: 290, height: 2, channels: 3 };
        normaliser.run(&pixels, &Place { width, height, left: 4, top: 2 }, &mut tensor).unwrap();
        let values: Vec<f32> = tensor.as_chunks().0.iter().map(|le| f32::from_le_bytes(*le)).collect();
        for (y, x, channel) in
            (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| (y, x, c))))
        {
            let at = match layout {
                Layout::Planar => (channel * height + y) * width + x,
                Layout::Interleaved => (y * width + x) * 3 + channel,
            };
            let inside = (2..4).contains(&y) && (4..294).contains(&x);
            let expected =
                if inside { bytes[((y - 2) * 290 + x - 4) * 3 + channel] } else { channel as u8 + 1 };
            assert_eq!(values[at], f32::from(expected), "{layout:?} at {x}, {y}, {channel}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let normaliser = Normaliser::new(Channels::Rgb, Layout::Planar, Dtype::F16, [1.0; 3], [0.0; 3]);
    let bytes = [1; 12];
    let pixels = Pixels { bytes: &bytes, stride: 6, width: 2, height: 2, channels: 3 };
    let mut tensor = [0; 24];
    let all = Place::all(2, 2);
    assert_eq!(
        normaliser.run(&pixels, &all, &mut tensor[1..]),
        Err(Misfit::Tensor { needed: 24, found: 23 })
    );
    let short = Pixels { bytes: &bytes[1..], ..pixels };
    assert_eq!(normaliser.run(&short, &all, &mut tensor), Err(Misfit::Pixels { needed: 12, found: 11 }));
    let outside = Place { left: 1, ..all };
    assert!(matches!(normaliser.run(&pixels, &outside, &mut tensor), Err(Misfit::Outside { .. })));
    let far = Place { left: usize::MAX, ..all };
    assert!(matches!(normaliser.run(&pixels, &far, &mut tensor), Err(Misfit::Outside { .. })));
    assert_eq!(
        normaliser.run(&Pixels { channels: 4, ..pixels }, &all, &mut tensor),
        Err(Misfit::Channels(4))
    );
    assert_eq!(tensor, [0; 24]);
}

#[test]
fn every_half_survives_the_way_and_every_tie_goes_to_even() {
    for bits in 0..=u16::MAX {
        let value = f32_of_f16(bits);
        if value.is_nan() {
            assert!(f32_of_f16(f16_bits(value)).is_nan());
            continue;
        }
        assert_eq!(f16_bits(value), bits);
        let next = f32_of_f16(bits + 1);
        if next.is_finite() && next.is_sign_positive() == value.is_sign_positive() {
            let middle = ((f64::from(value) + f64::from(next)) / 2.0) as f32;
            assert_eq!(f16_bits(middle), bits + (bits & 1), "{middle} lies between {value} and {next}");
        }
    }
    assert_eq!((f16_bits(65519.9), f16_bits(65520.0), f16_bits(f32::MAX)), (0x7bff, 0x7c00, 0x7c00));
    assert_eq!((f16_bits(1e-10), f16_bits(-1e-10)), (0, 0x8000));
    // Halves of a step above 1 and above the next: ties, which go to the even one.
    let tie = |steps: f32| bf16_bits(1.0 + steps / 128.0);
    assert_eq!((tie(0.0), tie(0.5), tie(1.5)), (0x3f80, 0x3f80, 0x3f82));
    assert!(f32_of_bf16(bf16_bits(f32::from_bits(0x7f80_0001))).is_nan());
    assert_eq!(bf16_bits(f32::MAX), 0x7f80);
}
