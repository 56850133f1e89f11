//! What the kernels take, as kernels/cuda has it: the same fields in the same order, and sizes that both sides check.

/// `Axis` of prepare_core.h.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Axis {
    pub(super) bounds: u32,
    pub(super) weights: u32,
    pub(super) window: u32,
    pub(super) precision: u32,
}

/// `Image` of prepare_core.h.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Image {
    pub(super) planes: [u64; 3],
    pub(super) tensor: u64,
    pub(super) strides: [u32; 2],
    pub(super) at: [u32; 2],
    pub(super) size: [u32; 2],
    pub(super) turn: u32,
    pub(super) format: u32,
    pub(super) across: Axis,
    pub(super) down: Axis,
    pub(super) factors: [i32; 6],
    pub(super) pad: [u8; 4],
    pub(super) row: u32,
}

/// `Prepare` of prepare.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Prepare {
    pub(super) images: u64,
    pub(super) bounds: u64,
    pub(super) weights: u64,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) channels: u32,
    pub(super) layout: u32,
    pub(super) dtype: u32,
    pub(super) mul: [f32; 3],
    pub(super) add: [f32; 3],
    pub(super) unused: u32,
}

/// `Convert` of convert.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Convert {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) factors: u64,
    pub(super) pixels: u64,
    pub(super) rows: u64,
    pub(super) channels: u32,
    pub(super) from_dtype: u32,
    pub(super) to_dtype: u32,
    pub(super) from_layout: u32,
    pub(super) to_layout: u32,
    pub(super) plain: u32,
}

/// `Rows` of rows.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Rows {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) list: u64,
    pub(super) bytes: u64,
    pub(super) from_stride: u64,
    pub(super) to_stride: u64,
    pub(super) rows: u32,
    pub(super) limit: u32,
    pub(super) unit: u32,
    pub(super) unused: u32,
}

/// `Tables` of rows.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Tables {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) wides: u64,
}

const _: () = {
    assert!(size_of::<Axis>() == 16 && size_of::<Image>() == 128 && size_of::<Prepare>() == 72);
    assert!(size_of::<Convert>() == 64 && size_of::<Rows>() == 64 && size_of::<Tables>() == 24);
};
