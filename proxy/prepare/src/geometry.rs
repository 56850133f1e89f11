//! Which part of an image becomes which part of a tensor: pure arithmetic, with the rounding of the libraries that models were
//! trained with.

use crate::PrepareError;
use crate::form::{Crop, Filter};
use crate::head::Orientation;

/// A resize that was checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sizing {
    /// As it is.
    None,
    /// The shorter side gets so many pixels.
    ShortestSide(u32),
    /// So many columns and rows.
    Exact(u32, u32),
    /// At most so many columns and rows, in the middle of as many.
    Letterbox(u32, u32),
}

/// How pixels are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sampling {
    pub(crate) filter: Filter,
    pub(crate) antialias: bool,
}

/// A part of the source, in its pixels and fractions of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Area {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

/// What becomes what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// Of the source.
    pub(crate) area: Area,
    /// Columns and rows it becomes.
    pub(crate) size: (u32, u32),
    /// Where they begin in the tensor.
    pub(crate) at: (u32, u32),
}

/// Python's `round`: to the even one of two that are as near.
fn round(value: f64) -> f64 {
    value.round_ties_even()
}

/// What to do with an upright image of `width` x `height`.
pub(crate) fn plan(
    width: u32,
    height: u32,
    sizing: Sizing,
    crop: Option<Crop>,
) -> Result<Plan, PrepareError> {
    let (all_width, all_height) = (f64::from(width), f64::from(height));
    let (resized, at) = match sizing {
        Sizing::None => ((width, height), (0, 0)),
        Sizing::Exact(width, height) => ((width, height), (0, 0)),
        Sizing::ShortestSide(size) => {
            // torchvision, and Pillow users before it: the longer side is cut to an integer, not rounded.
            let long = |long: u32, short: u32| {
                u32::try_from(u64::from(size) * u64::from(long) / u64::from(short)).unwrap_or(u32::MAX)
            };
            let resized =
                if width <= height { (size, long(height, width)) } else { (long(width, height), size) };
            (resized, (0, 0))
        }
        Sizing::Letterbox(columns, rows) => {
            let ratio = (f64::from(columns) / all_width).min(f64::from(rows) / all_height);
            let side = |all: f64, limit: u32| (round(all * ratio) as u32).clamp(1, limit);
            let size = (side(all_width, columns), side(all_height, rows));
            // Ultralytics' way to put the odd pixel right and below.
            let margin = |all: u32, used: u32| round(f64::from(all - used) / 2.0 - 0.1).max(0.0) as u32;
            (size, (margin(columns, size.0), margin(rows, size.1)))
        }
    };
    let whole = Area { left: 0.0, top: 0.0, width: all_width, height: all_height };
    let Some(crop) = crop else { return Ok(Plan { area: whole, size: resized, at }) };
    let start = |wanted: Option<u32>, all: u32, part: u32| match wanted {
        Some(start) => Some(start).filter(|start| start.checked_add(part).is_some_and(|end| end <= all)),
        None => all.checked_sub(part).map(|rest| round(f64::from(rest) / 2.0) as u32),
    };
    let starts = (start(crop.left, resized.0, crop.width), start(crop.top, resized.1, crop.height));
    let (Some(left), Some(top)) = starts else {
        let (crop_width, crop_height) = (crop.width, crop.height);
        return Err(PrepareError::TooSmall { width: resized.0, height: resized.1, crop_width, crop_height });
    };
    let (across, down) = (all_width / f64::from(resized.0), all_height / f64::from(resized.1));
    let area = Area {
        left: f64::from(left) * across,
        top: f64::from(top) * down,
        width: f64::from(crop.width) * across,
        height: f64::from(crop.height) * down,
    };
    Ok(Plan { area, size: (crop.width, crop.height), at: (0, 0) })
}

impl Plan {
    /// The same of an image that is stored otherwise, at `width` x `height` when upright. Where it lands stays as it is: the
    /// result is turned when it is small.
    pub(crate) fn stored(mut self, orientation: Orientation, width: u32, height: u32) -> Self {
        let area = &mut self.area;
        if orientation.mirrored {
            area.left = f64::from(width) - area.left - area.width;
        }
        if orientation.flipped {
            area.top = f64::from(height) - area.top - area.height;
        }
        if orientation.transposed {
            *area = Area { left: area.top, top: area.left, width: area.height, height: area.width };
            self.size = (self.size.1, self.size.0);
        }
        self
    }

    /// The smallest number of eighths at which every pixel of the result still has `margin` pixels of the source in each
    /// direction.
    pub(crate) fn eighths(&self, margin: f64) -> u32 {
        let enough = |eighths: u32| {
            let scale = f64::from(eighths) / 8.0;
            self.area.width * scale >= f64::from(self.size.0) * margin
                && self.area.height * scale >= f64::from(self.size.1) * margin
        };
        [1, 2, 4].into_iter().find(|eighths| enough(*eighths)).unwrap_or(8)
    }
}

impl Area {
    /// The same of a source that was decoded at `scale`, and has `width` x `height` pixels.
    pub(crate) fn scaled(self, scale: f64, width: u32, height: u32) -> Self {
        let (all_width, all_height) = (f64::from(width), f64::from(height));
        let left = (self.left * scale).clamp(0.0, all_width);
        let top = (self.top * scale).clamp(0.0, all_height);
        Self {
            left,
            top,
            width: (self.width * scale).min(all_width - left),
            height: (self.height * scale).min(all_height - top),
        }
    }

    /// The same in whole pixels, if it is so and as large as `size`: nothing is to be resampled then.
    pub(crate) fn whole(&self, size: (u32, u32)) -> Option<(usize, usize)> {
        let whole = self.left.fract() == 0.0
            && self.top.fract() == 0.0
            && self.width == f64::from(size.0)
            && self.height == f64::from(size.1);
        whole.then_some((self.left as usize, self.top as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQUARE: Crop = Crop { width: 224, height: 224, left: None, top: None };

    #[test]
    fn sizes_are_those_of_torchvision_and_of_ultralytics() {
        let cut = |width, height| plan(width, height, Sizing::ShortestSide(256), Some(SQUARE)).unwrap();
        // 256 x 1920 / 1080 is 455.1; half of 455 - 224 is 115.5, which Python rounds to 116.
        let found = cut(1920, 1080);
        assert_eq!(found.area.left, 116.0 * (1920.0 / 455.0));
        assert_eq!(found.area.top, 16.0 * (1080.0 / 256.0));
        assert_eq!((found.size, found.at), ((224, 224), (0, 0)));
        assert_eq!(cut(256, 256).area, Area { left: 16.0, top: 16.0, width: 224.0, height: 224.0 });
        let boxed = |width, height| plan(width, height, Sizing::Letterbox(640, 640), None).unwrap();
        assert_eq!((boxed(1920, 1080).size, boxed(1920, 1080).at), ((640, 360), (0, 140)));
        assert_eq!((boxed(810, 1081).size, boxed(810, 1081).at), ((480, 640), (80, 0)));
        // 640 - 479 is 161: 80 to the left, 81 to the right.
        assert_eq!((boxed(479, 640).size, boxed(479, 640).at), ((479, 640), (80, 0)));
        assert_eq!((boxed(1, 16_000).size, boxed(1, 16_000).at), ((1, 640), (319, 0)));
    }

    #[test]
    fn what_cannot_be_cut_out_is_told() {
        let error = plan(100, 300, Sizing::None, Some(SQUARE)).unwrap_err().to_string();
        assert!(error.starts_with("the image has 100 x 300 pixels, too few to crop 224 x 224"), "{error}");
        let far = Crop { left: Some(u32::MAX), ..SQUARE };
        assert!(plan(300, 300, Sizing::None, Some(far)).is_err());
    }

    #[test]
    fn a_turned_image_gives_the_same_pixels() {
        for exif in 1..=8 {
            let orientation = Orientation::of(exif);
            let crop = Crop { width: 2, height: 3, left: Some(1), top: Some(2) };
            let upright = plan(7, 9, Sizing::None, Some(crop)).unwrap();
            let stored = upright.stored(orientation, 7, 9);
            for (x, y) in (0..2).flat_map(|x| (0..3).map(move |y| (x, y))) {
                let of_all = orientation.stored(x + 1, y + 2, 7, 9);
                let of_part = orientation.stored(x, y, 2, 3);
                let (left, top) = stored.area.whole(stored.size).unwrap();
                assert_eq!(of_all, (of_part.0 + left, of_part.1 + top), "EXIF {exif}");
            }
        }
    }

    #[test]
    fn a_decoder_scales_as_far_as_the_margin_allows() {
        let found = plan(1920, 1080, Sizing::ShortestSide(256), Some(SQUARE)).unwrap();
        assert_eq!((found.eighths(1.0), found.eighths(2.0)), (2, 4));
        let large = plan(100, 100, Sizing::Exact(640, 640), None).unwrap();
        assert_eq!(large.eighths(1.0), 8);
    }
}
