//! Where a fuzzer begins: any bytes may be given to any of these, and none may panic, hang or take more than the limits say.

use crate::form::{Crop, Declaration};
use crate::head::Format;
use crate::{Limits, Pipeline, PrepareError, Scratch, head};

/// Small, so that a fuzzer does not spend its time on large images.
pub const LIMITS: Limits =
    Limits { bytes: 1 << 20, pixels: 1 << 20, side: 4096, memory: 16 << 20, scans: 16 };

/// The head of anything.
pub fn head(bytes: &[u8]) {
    let _ = head::read(bytes);
}

/// JPEG, at full size and at a fraction.
pub fn jpeg(bytes: &[u8]) -> Result<(), PrepareError> {
    decode(bytes, Format::Jpeg)
}

/// PNG.
pub fn png(bytes: &[u8]) -> Result<(), PrepareError> {
    decode(bytes, Format::Png)
}

/// WebP.
pub fn webp(bytes: &[u8]) -> Result<(), PrepareError> {
    decode(bytes, Format::Webp)
}

/// A declaration in JSON's terms; one that is accepted must have a shape.
pub fn declaration(declaration: &Declaration) {
    if let Ok(pipeline) = Pipeline::new(declaration) {
        assert!(pipeline.bytes() > 0, "{declaration:?} makes empty tensors");
    }
}

fn decode(bytes: &[u8], format: Format) -> Result<(), PrepareError> {
    if head::read(bytes)?.format != format {
        return Ok(());
    }
    let mut scratch = Scratch::default();
    let crop = Some(Crop { width: 1, height: 1, left: None, top: None });
    let whole = Declaration { crop, ..Declaration::default() };
    let preset = Declaration { preset: Some(crate::Preset::Imagenet), ..Declaration::default() };
    for declaration in [whole, preset] {
        let Ok(pipeline) = Pipeline::new(&declaration) else { continue };
        pipeline.run(bytes, &mut vec![0; pipeline.bytes()], &mut scratch, &LIMITS, &|| false)?;
    }
    Ok(())
}
