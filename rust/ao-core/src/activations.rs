//! The activation cache: rows of the residual stream on disk, found again by what the target had read.
//!
//! A cache is a folder of *units*, each written at once by one process: for every layer one safetensors file with one
//! tensor [`TENSOR`] of shape `[rows, width]`, and an index that is written last, so that a unit is there with its index
//! or not at all. The index says under which key each row stands: a hash of the token ids up to and including the row's
//! own, which is all that decides the row under causal attention. Files are written and read past the page cache where
//! the system allows it.

mod disk;
mod header;
pub mod index;
pub mod keys;
pub mod reader;
pub mod units;
pub mod writer;

use safetensors::Dtype;

use crate::error::{Error, Result};

/// Version of the headers and of the index.
pub const SCHEMA: u64 = 1;
/// Name of the one tensor of a file of rows.
pub const TENSOR: &str = "activations";
/// Bytes before the first row, the header's length included.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of rows under one checksum.
pub const BLOCK_BYTES: usize = 4 << 20;
/// Most values of a row; far more than a model has, and few enough that no product of sizes leaves 64 bits.
pub const MAX_WIDTH: usize = 1 << 24;
/// What an index's name ends with.
pub const INDEX_SUFFIX: &str = ".index.safetensors";

/// What rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowType {
    /// BF16, F16 or F32.
    pub dtype: Dtype,
    /// Values of a row.
    pub width: usize,
}

impl RowType {
    /// A row of `width` values of the type that safetensors calls `dtype`.
    ///
    /// # Errors
    /// If the type is no floating-point type of 2 or 4 bytes, or `width` is 0 or above [`MAX_WIDTH`].
    pub fn new(dtype: &str, width: usize) -> Result<Self> {
        let dtype = match dtype {
            "BF16" => Dtype::BF16,
            "F16" => Dtype::F16,
            "F32" => Dtype::F32,
            other => {
                return Err(Error::input(format!("rows of {other:?} cannot be kept; expected BF16, F16 or F32")));
            }
        };
        if !(1..=MAX_WIDTH).contains(&width) {
            return Err(Error::input(format!("a row of {width} values cannot be kept; expected 1 to {MAX_WIDTH}")));
        }
        Ok(Self { dtype, width })
    }

    /// Bytes of a row.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.width * if self.dtype == Dtype::F32 { 4 } else { 2 }
    }

    /// What safetensors calls the type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.dtype {
            Dtype::BF16 => "BF16",
            Dtype::F16 => "F16",
            _ => "F32",
        }
    }
}
