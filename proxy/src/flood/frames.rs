//! Where one HTTP/2 frame ends and the next begins (RFC 9113, 4.1). Pure.

/// Bytes of a frame's head.
pub const HEAD: usize = 9;

/// Types of frames (RFC 9113, 6).
pub const DATA: u8 = 0x0;
/// Begins a request, or its trailers.
pub const HEADERS: u8 = 0x1;
/// Ends a stream before its end.
pub const RST_STREAM: u8 = 0x3;
/// What a peer asks of the other.
pub const SETTINGS: u8 = 0x4;
/// Asks whether the other lives.
pub const PING: u8 = 0x6;
/// Ends a connection.
pub const GOAWAY: u8 = 0x7;

/// The flag of DATA and HEADERS that ends a stream's direction.
pub const END_STREAM: u8 = 0x1;
/// The flag of SETTINGS and PING that answers one.
pub const ACK: u8 = 0x1;

/// A frame's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes behind it.
    pub length: u32,
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// The stream that it is about; 0 is the connection.
    pub stream: u32,
}

impl Head {
    fn read([a, b, c, kind, flags, s @ ..]: [u8; HEAD]) -> Self {
        let stream = u32::from_be_bytes(s) & !(1 << 31);
        Self { length: u32::from_be_bytes([0, a, b, c]), kind, flags, stream }
    }

    /// Whether a flag is set.
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Follows the frames of one direction, however they are cut into pieces.
#[derive(Debug)]
pub struct Frames {
    /// Of a head, what has come, and how much of it that is.
    head: [u8; HEAD],
    have: usize,
    /// Bytes until the next head.
    rest: usize,
}

impl Frames {
    /// The first head comes after so many bytes.
    pub const fn after(bytes: usize) -> Self {
        Self { head: [0; HEAD], have: 0, rest: bytes }
    }

    /// Whether the last frame is over and the next has not begun.
    pub const fn between(&self) -> bool {
        self.have == 0 && self.rest == 0
    }

    /// Takes the next bytes, and tells each head in them.
    pub fn pass(&mut self, mut bytes: &[u8], mut tell: impl FnMut(Head)) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let over = self.rest.min(bytes.len());
                self.rest -= over;
                bytes = &bytes[over..];
                continue;
            }
            let taken = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD {
                let head = Head::read(self.head);
                self.have = 0;
                self.rest = head.length as usize;
                tell(head);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            lengths in prop::collection::vec(0_u32..300, 1..20),
            cuts in prop::collection::vec(1_usize..40, 1..200),
        ) {
            let mut bytes = vec![0; 24];
            for (number, length) in (1_u32..).zip(&lengths) {
                bytes.extend(&length.to_be_bytes()[1..]);
                bytes.extend([DATA, END_STREAM]);
                bytes.extend((number | 1 << 31).to_be_bytes());
                bytes.extend(vec![0xff; *length as usize]);
            }
            let (mut frames, mut found, mut rest) = (Frames::after(24), Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (piece, behind) = rest.split_at((*cut).min(rest.len()));
                frames.pass(piece, |head| found.push(head));
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            let meant: Vec<Head> = (1_u32..)
                .zip(&lengths)
                .map(|(stream, length)| Head { length: *length, kind: DATA, flags: END_STREAM, stream })
                .collect();
            prop_assert_eq!(found, meant);
            prop_assert!(frames.between());
        }
    }
}
