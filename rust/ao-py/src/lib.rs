//! The extension module `ao._ao`: the core's functions with Python's types around them.

#![allow(clippy::needless_pass_by_value, reason = "pyo3 hands the extracted arguments over")]

mod activations;
mod buffers;
mod error;
mod frame;
mod pack;
mod plan;
mod shard;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

/// Packing makes many small rows on all threads at once, which the system's allocator serves slowest.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Packing of activation-oracle training data.
#[pymodule(gil_used = false)]
mod _ao {
    #[pymodule_export]
    const RULES: u64 = ao_core::folder::RULES;

    #[pymodule_export]
    use super::activations::{
        ActivationReader, ActivationWriter, activation_arrays, activation_units, context_keys, verify_activations,
    };
    #[pymodule_export]
    use super::error::AoError;
    #[pymodule_export]
    use super::frame::{Context, Framer, Prompt};
    #[pymodule_export]
    use super::pack::{PackWriter, Source, input_digest, merge};
    #[pymodule_export]
    use super::plan::{pack_rows, plan};
    #[pymodule_export]
    use super::shard::{check_digest, shard_layout, shard_metadata, verify_shard, write_atomic};
}

/// A read-only buffer of int32 over a copy of `values`, of shape `[len / width, width]` if `width` is above 1.
fn int32_buffer<'py>(py: Python<'py>, values: &[i32], width: usize) -> PyResult<Bound<'py, PyMemoryView>> {
    let bytes = PyBytes::new_with(py, size_of_val(values), |out| {
        for (out, value) in out.chunks_exact_mut(size_of::<i32>()).zip(values) {
            out.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(())
    })?;
    let flat = PyMemoryView::from(&bytes)?;
    let cast = if width == 1 {
        flat.call_method1("cast", ("i",))?
    } else {
        flat.call_method1("cast", ("i", [values.len() / width, width]))?
    };
    Ok(cast.cast_into()?)
}
