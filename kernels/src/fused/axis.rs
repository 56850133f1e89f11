//! How one axis is resampled: which pixels count, and how much. The weights are those of `fast_image_resize`, which are
//! Pillow's, so that all of its users and the kernel give the same bits.

/// How pixels are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// A cubic, a = -0.5.
    Bicubic,
    /// Three lobes.
    Lanczos,
}

impl Filter {
    /// How far it reaches, in pixels.
    pub(crate) fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// What a pixel counts at a distance. The order of the operations is `fast_image_resize`'s, to the last bit.
    pub(crate) fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |x: f64| {
            let turned = x * std::f64::consts::PI;
            if x == 0.0 { 1.0 } else { turned.sin() / turned }
        };
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => match x.abs() {
                x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                _ => 0.0,
            },
        }
    }
}

/// Of each pixel of the result: the first pixel of the source, and what it and the next ones count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    /// First, and how many. Neither firsts nor ends ever go back from a pixel to the next, as the kernel's tiles want
    /// it.
    pub bounds: Vec<[u32; 2]>,
    /// `window` for each pixel, of which as many count as `bounds` says.
    pub weights: Vec<i16>,
    /// The most that count.
    pub window: usize,
    /// Bits of fraction of the weights.
    pub precision: u32,
}

/// Bits of a sum that are left for a weight: eight are the pixel's, and a filter with negative lobes needs two more.
const SUM_BITS: u32 = 32 - 8 - 2;

impl Axis {
    /// `count` pixels made of `length` pixels of a source of `all`, from `start` on.
    pub fn new(all: u32, start: f64, length: f64, count: u32, filter: Filter, antialias: bool) -> Self {
        if f64::from(count) == length && start.fract() == 0.0 {
            // As they are: a weight of 1.
            let bounds = (0..count).map(|at| [(start as u32 + at).min(all - 1), 1]).collect();
            return Self { bounds, weights: vec![1 << 14; count as usize], window: 1, precision: 14 };
        }
        let end = start + length;
        let scale = (end - start) / f64::from(count);
        let wide = if antialias { scale.max(1.0) } else { 1.0 };
        let (radius, narrow) = (filter.support() * wide, 1.0 / wide);
        let reach = |at: u32| {
            let centre = start + (f64::from(at) + 0.5) * scale;
            let first = ((centre - radius).floor().max(0.0) as u32).min(all - 1);
            let last = (centre + radius).ceil().min(f64::from(all)) as u32;
            (centre - 0.5, first, last.max(first + 1))
        };
        let bounds: Vec<[u32; 2]> =
            (0..count).map(reach).map(|(_, first, last)| [first, last - first]).collect();
        let window = bounds.iter().map(|[_, count]| *count as usize).max().unwrap_or(1);
        let mut shares = vec![0.0; window * count as usize];
        for (shares, (centre, first, last)) in shares.chunks_exact_mut(window).zip((0..count).map(reach)) {
            let mut sum = 0.0;
            for (share, at) in shares.iter_mut().zip(first..last) {
                *share = filter.weight((f64::from(at) - centre) * narrow);
                sum += *share;
            }
            if sum != 0.0 {
                shares.iter_mut().for_each(|share| *share /= sum);
            }
        }
        // As many bits of fraction as leave the largest weight within 16 bits.
        let most = shares.iter().copied().fold(0.0, f64::max);
        let fits = |bits: u32| ((most * f64::from(1u32 << bits)).round() as i32) < 1 << 15;
        let precision = (0..SUM_BITS).find(|bits| !fits(bits + 1)).unwrap_or(SUM_BITS - 1);
        let weights =
            shares.iter().map(|share| (share * f64::from(1u32 << precision)).round() as i16).collect();
        Self { bounds, weights, window, precision }
    }

    /// Whether `fast_image_resize` 6.1 would read outside of its memory for columns like these.
    ///
    /// It leaves out weights that are exactly zero at both ends of a pixel's window, and then takes the first pixel's
    /// first column and the last pixel's last one for the ends of all. Where a cubic enlarges, and a pixel of the
    /// result lies exactly on one of the source, its neighbour reaches further than it does.
    pub fn leaves_the_library(
        all: u32,
        start: f64,
        length: f64,
        count: u32,
        filter: Filter,
        antialias: bool,
    ) -> bool {
        let axis = Self::new(all, start, length, count, filter, antialias);
        let scale = (start + length - start) / f64::from(count);
        let narrow = 1.0 / if antialias { scale.max(1.0) } else { 1.0 };
        let ends = axis.bounds.iter().zip(0..count).map(|([first, reach], at)| {
            let centre = start + (f64::from(at) + 0.5) * scale - 0.5;
            let counts = |at: &u32| filter.weight((f64::from(*at) - centre) * narrow) != 0.0;
            let mut columns = (*first..first + reach).filter(counts);
            let begin = columns.next();
            (begin, columns.next_back().or(begin))
        });
        let (firsts, lasts): (Vec<_>, Vec<_>) = ends.unzip();
        // A pixel of which nothing counts is none that one should bet on either.
        firsts.contains(&None) || firsts.iter().min() != firsts.first() || lasts.iter().max() != lasts.last()
    }

    /// What counts for pixel `at`: the first pixel of the source, and the weights.
    pub fn of(&self, at: usize) -> (usize, &[i16]) {
        let [first, count] = self.bounds[at];
        (first as usize, &self.weights[at * self.window..][..count as usize])
    }
}
