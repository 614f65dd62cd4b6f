//! Reading shards by their layout, checking them, and writing files.

use std::path::PathBuf;

use ao_core::{layout, manifest};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::to_python;

/// One array of a shard: name, type, shape, byte offset from the start of the file.
pub(crate) type Layout<'py> = (String, String, Bound<'py, PyTuple>, u64);

/// The arrays of a shard, after checking its whole structure.
#[pyfunction]
pub fn shard_layout(py: Python<'_>, path: PathBuf) -> PyResult<Vec<Layout<'_>>> {
    to_tuples(py, py.detach(|| layout::layout(&path)).map_err(to_python)?)
}

pub(crate) fn to_tuples(py: Python<'_>, arrays: Vec<layout::ArrayLayout>) -> PyResult<Vec<Layout<'_>>> {
    arrays
        .into_iter()
        .map(|array| Ok((array.name, array.dtype, PyTuple::new(py, array.shape)?, array.offset)))
        .collect()
}

/// The canonical JSON in the header of a shard.
#[pyfunction]
pub fn shard_metadata(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| layout::metadata(&path)).map_err(to_python)
}

/// Check the content of a shard against the sha256 in its manifest.
#[pyfunction]
pub fn verify_shard(py: Python<'_>, path: PathBuf, sha256: &str) -> PyResult<()> {
    py.detach(|| layout::verify(&path, sha256)).map_err(to_python)
}

/// Check the content of a shard against the digest in its header.
#[pyfunction]
pub fn check_digest(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    py.detach(|| layout::check_digest(&path)).map_err(to_python)
}

/// Write a file so that a reader sees the old one or the whole new one.
#[pyfunction]
pub fn write_atomic(py: Python<'_>, path: PathBuf, data: &[u8]) -> PyResult<()> {
    py.detach(|| manifest::write_atomic(&path, data)).map_err(to_python)
}
