//! The order of training.

use ao_core::plan::{Layout, Longer, PlanSettings, Reach, RowLimits, pack_rows as lay_out, plan as plan_epoch};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use crate::error::to_python;
use crate::int32_buffer;

/// Order the datapoints of one epoch into steps and divide each step among ranks.
#[pyfunction]
#[pyo3(signature = (lengths, context_lengths, groups, *, examples_per_step, window, ranks, seed, epoch))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn plan(
    py: Python<'_>,
    lengths: PyBuffer<i32>,
    context_lengths: PyBuffer<i32>,
    groups: PyBuffer<i64>,
    examples_per_step: usize,
    window: usize,
    ranks: usize,
    seed: u64,
    epoch: u64,
) -> PyResult<(Bound<'_, PyMemoryView>, Bound<'_, PyMemoryView>)> {
    let (lengths, context_lengths) = (lengths.to_vec(py)?, context_lengths.to_vec(py)?);
    let groups = groups.to_vec(py)?;
    let settings = PlanSettings { examples_per_step, window, ranks, seed, epoch };
    let plan = py.detach(|| plan_epoch(&lengths, &context_lengths, &groups, settings)).map_err(to_python)?;
    Ok((int32_buffer(py, &plan.order, 1)?, int32_buffer(py, &plan.rank, 1)?))
}

/// Lay examples out in rows of a token budget.
#[pyfunction]
#[pyo3(signature = (
    lengths, tokens_per_row, *, context_lengths=None, context_tokens_per_row=None, examples_per_row=None, window=None,
    padded=false, longer_alone=false
))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn pack_rows(
    py: Python<'_>,
    lengths: PyBuffer<i32>,
    tokens_per_row: usize,
    context_lengths: Option<PyBuffer<i32>>,
    context_tokens_per_row: Option<usize>,
    examples_per_row: Option<usize>,
    window: Option<usize>,
    padded: bool,
    longer_alone: bool,
) -> PyResult<(Bound<'_, PyMemoryView>, Bound<'_, PyMemoryView>)> {
    let contexts = context_lengths.map_or(Ok(Vec::new()), |contexts| contexts.to_vec(py))?;
    let lengths = lengths.to_vec(py)?;
    let limits = RowLimits {
        tokens: tokens_per_row,
        context_tokens: context_tokens_per_row,
        examples: examples_per_row,
        layout: if padded { Layout::Padded } else { Layout::Packed },
        longer: if longer_alone { Longer::Alone } else { Longer::Refuse },
    };
    let reach = window.map_or(Reach::All, Reach::Next);
    let rows = py.detach(|| lay_out(&lengths, &contexts, limits, reach)).map_err(to_python)?;
    Ok((int32_buffer(py, &rows.order, 1)?, int64_buffer(py, &rows.offsets)?))
}

/// A read-only buffer of int64 over a copy of `values`.
fn int64_buffer<'py>(py: Python<'py>, values: &[i64]) -> PyResult<Bound<'py, PyMemoryView>> {
    let bytes = PyBytes::new_with(py, size_of_val(values), |out| {
        for (out, value) in out.chunks_exact_mut(size_of::<i64>()).zip(values) {
            out.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(())
    })?;
    Ok(PyMemoryView::from(&bytes)?.call_method1("cast", ("q",))?.cast_into()?)
}
