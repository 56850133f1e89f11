//! The declared form of a pipeline, as it stands in an `InferencePolicy`, and its presets.
//!
//! Every field may be left out. What is left out comes from the preset if one is named, and otherwise from the defaults that
//! the fields tell. Unknown fields are errors. Whether the whole makes sense is [`Pipeline::new`](crate::Pipeline::new)'s to say.

use serde::{Deserialize, Serialize};

use penstock_kernels::normalise;

/// A pipeline as somebody wrote it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Declaration {
    /// Where to begin; fields that are given win over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// What comes in; an image unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<Input>,
    /// Whether EXIF's orientation is followed; yes unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orientation: Option<OrientationRule>,
    /// Whether a JPEG that is made smaller anyway may be decoded at a fraction of its size; `fine` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jpeg_scaling: Option<JpegScaling>,
    /// To which size; not at all unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize: Option<Resize>,
    /// What is cut out after that; nothing unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<Crop>,
    /// The tensor's channels; `rgb` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub colour: Option<Colour>,
    /// What happens to the numbers; nothing unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalise: Option<Normalise>,
    /// Order of dimensions; `nchw` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Type of elements; `f32` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
}

/// Pipelines that many models want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// torchvision's for classification: shortest side 256, bilinear, centre 224 x 224, mean and deviation of ImageNet, f32 NCHW.
    Imagenet,
    /// OpenAI's CLIP: shortest side 224, bicubic, centre 224 x 224, its own mean and deviation, f32 NCHW.
    Clip,
    /// Ultralytics' YOLO: 640 x 640 with margins of 114, bilinear without antialiasing as OpenCV does it, 0 to 1, f32 NCHW.
    YoloLetterbox,
}

/// What comes in.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Input {
    /// Its format.
    pub format: InputFormat,
    /// Columns; for all but `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Rows; for all but `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// Channels of a tensor; 3 unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<u32>,
    /// Type of a tensor's elements; `u8` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Order of a tensor's dimensions; `nhwc` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Coefficients of `nv12` and `yuv420`; `bt601` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matrix: Option<Matrix>,
    /// Range of `nv12` and `yuv420`; `limited` unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<Range>,
}

/// Formats that can come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputFormat {
    /// JPEG, PNG or WebP, whichever it is.
    #[default]
    Image,
    /// Three bytes a pixel.
    Rgb,
    /// A plane of luma, then a plane of pairs of chroma at half the size.
    Nv12,
    /// A plane of luma, then two of chroma at half the size (I420).
    Yuv420,
    /// A tensor of one image, whose numbers and order are changed.
    Tensor,
}

/// Whether EXIF's orientation is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OrientationRule {
    /// It is.
    Exif,
    /// The image is taken as it is stored.
    Ignore,
}

/// How far a JPEG may be made smaller by its decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JpegScaling {
    /// Not at all: what a full decode gives.
    Off,
    /// To no less than twice the wanted size, so that the filter decides what is seen.
    Fine,
    /// To no less than the wanted size: the least work. Builds without libjpeg-turbo take it for `fine`.
    Fast,
}

/// To which size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Resize {
    /// How proportions are treated.
    pub mode: ResizeMode,
    /// Pixels of the shorter side; for `shortest-side`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
    /// Columns; for `exact` and `letterbox`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Rows; for `exact` and `letterbox`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// How pixels are weighed; `bilinear` unless said.
    #[serde(default)]
    pub filter: Filter,
    /// Whether the filter widens with the scale, as in Pillow; not in OpenCV's `INTER_LINEAR`. Yes unless said.
    #[serde(default = "yes")]
    pub antialias: bool,
    /// Margins of a `letterbox`, 0 to 255 in every channel; 114 unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad: Option<u8>,
}

fn yes() -> bool {
    true
}

/// How proportions are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeMode {
    /// Kept; the shorter side gets `size`. Needs a crop, so that all tensors have one shape.
    ShortestSide,
    /// Not kept.
    Exact,
    /// Kept; what is left is filled with `pad` on both sides.
    Letterbox,
}

/// How pixels are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// A triangle.
    #[default]
    Bilinear,
    /// Catmull-Rom, a = -0.5.
    Bicubic,
    /// Lanczos with three lobes.
    Lanczos,
}

/// What is cut out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Crop {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// From which column; in the middle unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<u32>,
    /// From which row; in the middle unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<u32>,
}

/// The tensor's channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Colour {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// One channel of luma.
    Gray,
}

/// `(pixel x scale - mean) / std`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Normalise {
    /// Applied first; 1/255 for pixels and 1 for tensors unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Of each channel of the tensor in its order, or one for all; 0 unless said.
    pub mean: Vec<f64>,
    /// Of each channel of the tensor in its order, or one for all; 1 unless said.
    pub std: Vec<f64>,
}

impl Default for Normalise {
    fn default() -> Self {
        Self { scale: None, mean: vec![0.0], std: vec![1.0] }
    }
}

/// Order of dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// A plane for each channel.
    Nchw,
    /// The channels of a pixel beside each other.
    Nhwc,
}

/// Type of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// UINT8.
    U8,
    /// FP16.
    F16,
    /// BF16.
    Bf16,
    /// FP32.
    F32,
}

impl Dtype {
    /// As the Open Inference Protocol calls it.
    pub fn protocol_name(self) -> &'static str {
        match self {
            Self::U8 => "UINT8",
            Self::F16 => "FP16",
            Self::Bf16 => "BF16",
            Self::F32 => "FP32",
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        normalise::Dtype::from(self).size()
    }
}

impl From<Dtype> for normalise::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::U8 => Self::U8,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F32 => Self::F32,
        }
    }
}

/// Coefficients from YUV to RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matrix {
    /// ITU-R BT.601: JPEG, standard definition, OpenCV.
    Bt601,
    /// ITU-R BT.709: high definition.
    Bt709,
}

/// What black and white are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Range {
    /// 16 and 235.
    Limited,
    /// 0 and 255.
    Full,
}

impl Preset {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 3] =
        [("imagenet", Self::Imagenet), ("clip", Self::Clip), ("yolo-letterbox", Self::YoloLetterbox)];

    /// What it stands for.
    pub fn declaration(self) -> Declaration {
        let resize = |mode, size, filter| Resize {
            mode,
            size,
            width: None,
            height: None,
            filter,
            antialias: true,
            pad: None,
        };
        let square = |side| Crop { width: side, height: side, left: None, top: None };
        let empty = Declaration::default();
        match self {
            Self::Imagenet => Declaration {
                resize: Some(resize(ResizeMode::ShortestSide, Some(256), Filter::Bilinear)),
                crop: Some(square(224)),
                normalise: Some(Normalise {
                    scale: None,
                    mean: vec![0.485, 0.456, 0.406],
                    std: vec![0.229, 0.224, 0.225],
                }),
                ..empty
            },
            Self::Clip => Declaration {
                resize: Some(resize(ResizeMode::ShortestSide, Some(224), Filter::Bicubic)),
                crop: Some(square(224)),
                normalise: Some(Normalise {
                    scale: None,
                    mean: vec![0.481_454_66, 0.457_827_5, 0.408_210_73],
                    std: vec![0.268_629_54, 0.261_302_58, 0.275_777_11],
                }),
                ..empty
            },
            Self::YoloLetterbox => Declaration {
                resize: Some(Resize {
                    width: Some(640),
                    height: Some(640),
                    antialias: false,
                    ..resize(ResizeMode::Letterbox, None, Filter::Bilinear)
                }),
                normalise: Some(Normalise::default()),
                ..empty
            },
        }
    }
}

impl Declaration {
    /// This with what its preset says of everything that it does not say itself.
    pub fn complete(&self) -> Self {
        let base = self.preset.map(Preset::declaration).unwrap_or_default();
        let own = self.clone();
        Self {
            preset: None,
            input: own.input.or(base.input),
            orientation: own.orientation.or(base.orientation),
            jpeg_scaling: own.jpeg_scaling.or(base.jpeg_scaling),
            resize: own.resize.or(base.resize),
            crop: own.crop.or(base.crop),
            colour: own.colour.or(base.colour),
            normalise: own.normalise.or(base.normalise),
            layout: own.layout.or(base.layout),
            dtype: own.dtype.or(base.dtype),
        }
    }
}
