//! The compiled kernels that this binary carries, and which of them fits a device. `make cubins` makes them
//! (kernels/cuda/compile.py).

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image {
    /// The compute capability that it is for.
    pub(super) capability: (u32, u32),
    /// Machine code, which runs on that and on later minor versions of it. Otherwise PTX, which any later one compiles
    /// for itself.
    pub(super) machine: bool,
    /// An ELF file, or text that ends with a zero.
    pub(super) bytes: &'static [u8],
}

/// PTX as the driver wants it.
const fn ended<const N: usize, const M: usize>(text: &[u8; N]) -> [u8; M] {
    assert!(M == N + 1);
    let mut all = [0; M];
    let mut at = 0;
    while at < N {
        all[at] = text[at];
        at += 1;
    }
    all
}

const PTX: &[u8; include_bytes!("../../cubin/penstock.compute_75.ptx").len()] =
    include_bytes!("../../cubin/penstock.compute_75.ptx");
static PTX_ENDED: [u8; PTX.len() + 1] = ended(PTX);

/// All of them.
pub(super) static IMAGES: &[Image] = &[
    machine(7, 5, include_bytes!("../../cubin/penstock.sm_75.cubin")),
    machine(8, 0, include_bytes!("../../cubin/penstock.sm_80.cubin")),
    machine(8, 6, include_bytes!("../../cubin/penstock.sm_86.cubin")),
    machine(9, 0, include_bytes!("../../cubin/penstock.sm_90.cubin")),
    machine(10, 0, include_bytes!("../../cubin/penstock.sm_100.cubin")),
    machine(12, 0, include_bytes!("../../cubin/penstock.sm_120.cubin")),
    Image { capability: (7, 5), machine: false, bytes: &PTX_ENDED },
];

const fn machine(major: u32, minor: u32, bytes: &'static [u8]) -> Image {
    Image { capability: (major, minor), machine: true, bytes }
}

/// Those that a device of this compute capability can run, the best first.
pub(super) fn fitting(images: &[Image], capability: (u32, u32)) -> Vec<Image> {
    let fits = |image: &&Image| match image.machine {
        true => image.capability.0 == capability.0 && image.capability.1 <= capability.1,
        false => image.capability <= capability,
    };
    let mut fitting: Vec<Image> = images.iter().filter(fits).copied().collect();
    fitting.sort_by_key(|image| std::cmp::Reverse((image.machine, image.capability)));
    fitting
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_what_is_nearest_to_it() {
        let first =
            |capability| fitting(IMAGES, capability).first().map(|image| (image.machine, image.capability));
        let machine = |major, minor| Some((true, (major, minor)));
        assert_eq!(first((7, 5)), machine(7, 5));
        assert_eq!(first((8, 0)), machine(8, 0));
        assert_eq!(first((8, 6)), machine(8, 6));
        assert_eq!(first((8, 7)), machine(8, 6));
        assert_eq!(first((8, 9)), machine(8, 6));
        assert_eq!(first((9, 0)), machine(9, 0));
        assert_eq!(first((10, 3)), machine(10, 0));
        assert_eq!(first((12, 1)), machine(12, 0));
        // No machine code, but text.
        assert_eq!(first((11, 0)), Some((false, (7, 5))));
        assert_eq!(first((13, 0)), Some((false, (7, 5))));
        // Too old for either.
        assert_eq!(first((7, 0)), None);
        assert!(
            fitting(IMAGES, (9, 0)).last().is_some_and(|image| !image.machine),
            "the text is the last resort"
        );
    }

    #[test]
    fn images_are_what_they_are_called() {
        for image in IMAGES {
            if image.machine {
                assert!(image.bytes.starts_with(b"\x7fELF"));
            } else {
                assert!(image.bytes.starts_with(b"//") && image.bytes.ends_with(b"\0"));
                let text = std::str::from_utf8(image.bytes).unwrap();
                assert!(text.contains(".target sm_75"));
                // A driver reads no PTX that is newer than itself: 8.1 is CUDA 12.1.
                assert!(text.contains(".version 8.1"));
            }
        }
    }
}
