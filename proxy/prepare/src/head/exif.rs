//! Which way up: one tag of EXIF. What cannot be read of it means that the image is as it should be, as every viewer has it.

/// How stored pixels become the image: transposed first, then mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Orientation {
    /// Rows and columns are exchanged.
    pub transposed: bool,
    /// Left and right are exchanged, after that.
    pub mirrored: bool,
    /// Top and bottom are exchanged, after that.
    pub flipped: bool,
}

impl Orientation {
    /// By EXIF's number, 1 to 8; any other is 1.
    pub fn of(exif: u16) -> Self {
        let (transposed, mirrored, flipped) = match exif {
            2 => (false, true, false),
            3 => (false, true, true),
            4 => (false, false, true),
            5 => (true, false, false),
            6 => (true, true, false),
            7 => (true, true, true),
            8 => (true, false, true),
            _ => (false, false, false),
        };
        Self { transposed, mirrored, flipped }
    }

    /// Whether nothing is to be done.
    pub fn is_upright(self) -> bool {
        self == Self::default()
    }

    /// Where pixel (`x`, `y`) of an image of `width` x `height` (turned) is stored.
    pub fn stored(self, x: usize, y: usize, width: usize, height: usize) -> (usize, usize) {
        let x = if self.mirrored { width - 1 - x } else { x };
        let y = if self.flipped { height - 1 - y } else { y };
        if self.transposed { (y, x) } else { (x, y) }
    }
}

/// The orientation in EXIF data, which begins with a TIFF header.
pub fn orientation(exif: &[u8]) -> Orientation {
    Orientation::of(number(exif).unwrap_or(1))
}

fn number(exif: &[u8]) -> Option<u16> {
    let big = match exif.first_chunk()? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let two = |at: usize| -> Option<u16> {
        let bytes = *exif.get(at..)?.first_chunk()?;
        Some(if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let four = |at: usize| -> Option<usize> {
        let bytes = *exif.get(at..)?.first_chunk()?;
        Some(if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) } as usize)
    };
    let directory = four(4)?;
    let entries = usize::from(two(directory)?);
    (0..entries).find_map(|entry| {
        let at = directory.checked_add(2 + 12 * entry)?;
        // Tag 0x0112, one number of 16 bits.
        (two(at)? == 0x0112 && two(at + 2)? == 3 && four(at + 4)? == 1).then(|| two(at + 8))?
    })
}
