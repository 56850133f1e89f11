//! JPEGs by nvJPEG, on the STAND-IN's own (kernels/standin): pixels are where they should be, nothing is given away
//! before the device is done, and every failure leaves the file to the CPU and nothing behind.

use bytes::Bytes;
use penstock_kernels::arena::{Arena, Kind as Memory};
use penstock_kernels::cuda::{Context, JpegError, JpegKind, Jpegs, NoJpegs, Span, Stream};
use penstock_kernels::fused::{Format, Frame};

use crate::driver::StandIn;

fn photo(name: &str) -> Bytes {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy/prepare/tests/images");
    std::fs::read(format!("{folder}/{name}")).unwrap().into()
}

/// The CPU's pixels, and how they lie.
fn decoded(file: &[u8]) -> (Frame, Vec<u8>) {
    let mut decoder = jpeg_decoder::Decoder::new(file);
    let pixels = decoder.decode().unwrap();
    let info = decoder.info().unwrap();
    let gray = info.pixel_format == jpeg_decoder::PixelFormat::L8;
    let format = if gray { Format::Gray } else { Format::Rgb };
    (Frame::tight(format, info.width.into(), info.height.into()), pixels)
}

/// A gray picture of that size, in as few bytes as there are: each block says no more than that it is as the one before.
fn jpeg_of(width: u16, height: u16) -> Bytes {
    let (h, w) = (height.to_be_bytes(), width.to_be_bytes());
    let blocks = usize::from(width / 8) * usize::from(height / 8);
    let table = [&[0xff, 0xdb, 0, 67, 0][..], &[1; 64]].concat();
    let frame = [0xff, 0xc0, 0, 11, 8, h[0], h[1], w[0], w[1], 1, 1, 0x11, 0];
    // One code of one bit, for no difference and for the end of a block.
    let mut codes = Vec::new();
    for class in [0x00, 0x10] {
        codes.extend_from_slice(&[0xff, 0xc4, 0, 20, class, 1]);
        codes.extend_from_slice(&[0; 15]);
        codes.push(0);
    }
    let scan = [0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0];
    [&[0xff, 0xd8][..], &table, &frame, &codes, &scan, &vec![0; blocks / 4], &[0xff, 0xd9]].concat().into()
}

struct Bed {
    context: Context,
    stream: Stream,
    jpegs: Jpegs,
}

fn bed(standin: &StandIn) -> Bed {
    let context = standin.context();
    let jpegs = Jpegs::open(&context, Some(&standin.path)).unwrap();
    Bed { stream: context.stream().unwrap(), context, jpegs }
}

impl Bed {
    fn room(&self, bytes: usize) -> Span {
        self.context.alloc(bytes).unwrap().whole()
    }

    fn download(&self, place: &Span) -> Vec<u8> {
        let arena = Arena::new(Memory::Pinned { context: &self.context }, place.bytes(), 4096).unwrap();
        let run = arena.run(&[place.bytes()], 1).unwrap().seal().unwrap();
        let (run, _) = self.stream.download(place.memory(), 0, run, 0, 0..1).unwrap().wait().unwrap();
        run.input(0, 0..1).unwrap().to_vec()
    }
}

#[test]
fn pixels_lie_where_they_were_asked_for_and_nowhere_else() {
    let standin = StandIn::new("delay=200us");
    let bed = bed(&standin);
    for name in [
        "baseline-420.jpg",
        "baseline-422.jpg",
        "baseline-444.jpg",
        "progressive.jpg",
        "restart.jpg",
        "gray.jpg",
    ] {
        let file = photo(name);
        let (tight, wanted) = decoded(&file);
        for gap in [0, 5] {
            let row = tight.strides[0] as usize;
            let frame = Frame { strides: [tight.strides[0] + gap, 0], ..tight };
            let place = bed.room(frame.bytes().unwrap());
            bed.stream.fill(place.memory(), 0..place.bytes(), 9).unwrap().wait().unwrap();
            let pending = bed.jpegs.decode(&bed.stream, file.clone(), &frame, &place).unwrap();
            pending.wait().unwrap();
            let found = bed.download(&place);
            for (found, wanted) in found.chunks(frame.strides[0] as usize).zip(wanted.chunks(row)) {
                assert!(&found[..row] == wanted, "{name}");
                assert!(found[row..].iter().all(|byte| *byte == 9), "{name}: between two rows");
            }
        }
    }
    let Bed { context, stream, jpegs } = bed;
    drop((stream, jpegs, context));
    assert_eq!(standin.left(), 0);
}

#[test]
fn a_file_and_its_state_are_kept_until_the_device_is_done() {
    let standin = StandIn::new("");
    let bed = bed(&standin);
    let file = photo("baseline-420.jpg");
    let (frame, wanted) = decoded(&file);
    standin.script("delay=30ms");
    let places: Vec<Span> = (0..3).map(|_| bed.room(wanted.len())).collect();
    for place in &places {
        // Nobody waits for it; its state must not serve the next meanwhile, which the stand-in would refuse.
        drop(bed.jpegs.decode(&bed.stream, file.clone(), &frame, place).unwrap());
    }
    assert!(bed.context.reap() > 0, "they are on their way");
    for place in &places {
        assert!(bed.download(place) == wanted);
    }
    bed.context.wait().unwrap();
    standin.script("delay=0us");
    // The three states are there again, and no fourth is made.
    standin.log();
    let again: Vec<_> = places
        .iter()
        .map(|place| bed.jpegs.decode(&bed.stream, file.clone(), &frame, place).unwrap())
        .collect();
    assert!(!standin.log().iter().any(|call| call.starts_with("nvjpegJpegStateCreate")));
    again.into_iter().for_each(|pending| drop(pending.wait().unwrap()));
    drop(places);
    drop(bed);
    assert_eq!(standin.left(), 0);
}

#[test]
fn there_are_no_more_decodes_at_once_than_states() {
    let standin = StandIn::new("");
    let bed = bed(&standin);
    let file = photo("gray.jpg");
    let (frame, wanted) = decoded(&file);
    let place = bed.room(wanted.len());
    standin.script("delay=20ms");
    let decode = || bed.jpegs.decode(&bed.stream, file.clone(), &frame, &place);
    let all: Vec<_> = (0..8).map(|_| decode().unwrap()).collect();
    assert_eq!(decode().unwrap_err(), JpegError::Busy);
    standin.script("delay=0us");
    all.into_iter().for_each(|pending| drop(pending.wait().unwrap()));
    drop(decode().unwrap().wait().unwrap());
}

/// The library's memory grows with the pictures that a state has seen, so that of a large one is given back.
#[test]
fn a_state_that_has_seen_a_large_picture_is_ended_after_it() {
    let standin = StandIn::new("");
    let bed = bed(&standin);
    let large = jpeg_of(2048, 2048);
    let small = photo("baseline-420.jpg");
    for (file, left) in [(&small, (1, 97 * 61)), (&large, (0, 0)), (&small, (1, 97 * 61))] {
        let (frame, wanted) = decoded(file);
        let place = bed.room(wanted.len());
        let pending = bed.jpegs.decode(&bed.stream, file.clone(), &frame, &place).unwrap();
        assert_eq!(bed.jpegs.room().1, u64::from(frame.width) * u64::from(frame.height));
        drop(pending.wait().unwrap());
        assert!(bed.download(&place) == wanted);
        assert_eq!(bed.jpegs.room(), left);
    }
    drop(bed);
    assert_eq!(standin.left(), 0);
}

#[test]
fn what_it_does_not_take_is_the_cpus() {
    let standin = StandIn::new("");
    let bed = bed(&standin);
    let whole = photo("baseline-420.jpg");
    let (frame, pixels) = decoded(&whole);
    let place = bed.room(pixels.len());
    let decode = |file: Bytes, frame: &Frame, place: &Span| {
        let error = bed.jpegs.decode(&bed.stream, file, frame, place).map(drop).unwrap_err();
        assert_eq!(error.kind(), JpegKind::File, "{error}");
        error.to_string()
    };
    let told = decode(whole.slice(..whole.len() / 3), &frame, &place);
    assert!(told.contains("NVJPEG_STATUS_BAD_JPEG (3); the file is damaged"), "{told}");
    // Four components, as an RGB picture of the same size.
    let file = photo("cmyk.jpg");
    let mut decoder = jpeg_decoder::Decoder::new(&file[..]);
    decoder.read_info().unwrap();
    let info = decoder.info().unwrap();
    let cmyk = Frame::tight(Format::Rgb, info.width.into(), info.height.into());
    let told = decode(file, &cmyk, &bed.room(cmyk.bytes().unwrap()));
    assert!(told.contains("columns, rows and components"), "{told}");
    // A head that we read in another way than the library must not write behind its place.
    let narrow = Frame::tight(Format::Rgb, frame.width - 1, frame.height);
    let told = decode(whole.clone(), &narrow, &place);
    assert!(told.contains("columns, rows and components"), "{told}");
    let short = place.part(0..place.bytes() - 1).unwrap();
    assert_eq!(decode(whole.clone(), &frame, &short), JpegError::Place.to_string());
    let video = Frame::tight(Format::Nv12, frame.width, frame.height);
    assert_eq!(decode(whole.clone(), &video, &place), JpegError::Place.to_string());
    drop(bed.jpegs.decode(&bed.stream, whole, &frame, &place).unwrap().wait().unwrap());
    drop((short, place, bed));
    assert_eq!(standin.left(), 0);
}

#[test]
fn a_library_of_another_version_or_that_does_not_start_is_none() {
    for (script, words) in [
        ("nvjpeg=10.2.0", "has version 10, and versions 11 to 13 are known"),
        ("nvjpeg=14.0.0", "has version 14"),
        (
            "fail=nvjpegCreateEx:6",
            "NVJPEG_STATUS_EXECUTION_FAILED (6); the device or its driver failed, or is older",
        ),
        ("fail=nvjpegCreateEx:5", "NVJPEG_STATUS_ALLOCATOR_FAILURE (5)"),
        ("fail=nvjpegCreateEx:7", "NVJPEG_STATUS_ARCH_MISMATCH (7)"),
        ("fail=nvjpegGetProperty:8", "nvjpegGetProperty said NVJPEG_STATUS_INTERNAL_ERROR"),
        ("fail=nvjpegCreateEx:2@1+", "NVJPEG_STATUS_INVALID_PARAMETER (2)"),
    ] {
        let standin = StandIn::new(script);
        let context = standin.context();
        let error: NoJpegs = Jpegs::open(&context, Some(&standin.path)).unwrap_err();
        let told = error.to_string();
        assert!(told.starts_with("nvJPEG is not used: ") && told.contains(words), "{script}: {told}");
        assert!(told.ends_with("; JPEGs are decoded on the CPU") && !told.contains('\n'), "{told}");
        drop(context);
        assert_eq!(standin.left(), 0, "{script}");
    }
    // Flags that an old one does not know are left out.
    let standin = StandIn::new("nvjpeg=11.9.0");
    let bed = bed(&standin);
    assert_eq!(bed.jpegs.version(), (11, 9, 0));
    let flags: Vec<_> = standin.log().into_iter().filter(|call| call.starts_with("nvjpegCreateEx")).collect();
    assert_eq!(flags, ["nvjpegCreateEx backend=0 flags=36", "nvjpegCreateEx backend=0 flags=4"]);
}

#[test]
fn every_failure_leaves_nothing_behind_and_the_next_decode_works() {
    for (script, kind) in [
        ("fail=nvjpegGetImageInfo:3", JpegKind::File),
        ("fail=nvjpegJpegStateCreate:5", JpegKind::Passing),
        ("fail=nvjpegDecode:4", JpegKind::File),
        ("fail=nvjpegDecode:5", JpegKind::Passing),
        ("fail=nvjpegDecode:1", JpegKind::Broken),
        ("fail=nvjpegDecode:6", JpegKind::Doubtful),
        ("fail=nvjpegGetImageInfo:2", JpegKind::Doubtful),
        ("fail=nvjpegDecode:8", JpegKind::Doubtful),
    ] {
        let standin = StandIn::new("delay=1ms");
        let bed = bed(&standin);
        let file = photo("baseline-420.jpg");
        let (frame, wanted) = decoded(&file);
        let place = bed.room(wanted.len());
        standin.script(script);
        let error = bed.jpegs.decode(&bed.stream, file.clone(), &frame, &place).map(drop).unwrap_err();
        assert_eq!(error.kind(), kind, "{script}: {error}");
        drop(bed.jpegs.decode(&bed.stream, file, &frame, &place).unwrap().wait().unwrap());
        assert!(bed.download(&place) == wanted, "{script}");
        drop((place, bed));
        assert_eq!(standin.left(), 0, "{script}");
    }
}

#[test]
fn a_device_that_is_lost_in_a_decode_is_lost() {
    let standin = StandIn::new("");
    let bed = bed(&standin);
    let file = photo("baseline-420.jpg");
    let (frame, wanted) = decoded(&file);
    let place = bed.room(wanted.len());
    standin.script("lose=nvjpegDecode:719");
    let error = bed.jpegs.decode(&bed.stream, file.clone(), &frame, &place).map(drop).unwrap_err();
    assert!(matches!(error.kind(), JpegKind::Driver | JpegKind::Doubtful), "{error}");
    let error = bed.jpegs.decode(&bed.stream, file, &frame, &place).map(drop).unwrap_err();
    assert_eq!(error.kind(), JpegKind::Driver, "{error}");
    assert!(bed.context.is_lost());
}
