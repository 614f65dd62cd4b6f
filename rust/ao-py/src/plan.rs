//! The order of training.

use ao_core::plan::{
    Datapoints, Layout, Longer, PlanSettings, Reach, RowLimits, Sharing, pack_rows as lay_out, plan as plan_epoch,
};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyMemoryView};

use crate::error::to_python;
use crate::int32_buffer;

/// Order the datapoints of one epoch into steps, divide each among ranks and lay out each rank's in rows.
#[pyfunction]
pub fn plan<'py>(
    py: Python<'py>,
    lengths: PyBuffer<i32>,
    context_lengths: PyBuffer<i32>,
    groups: PyBuffer<i64>,
    settings_json: &str,
) -> PyResult<Bound<'py, PyDict>> {
    let settings = PlanSettings::from_json(settings_json).map_err(to_python)?;
    let (lengths, context_lengths) = (lengths.to_vec(py)?, context_lengths.to_vec(py)?);
    let groups = groups.to_vec(py)?;
    let datapoints = Datapoints { lengths: &lengths, context_lengths: &context_lengths, groups: &groups };
    let plan = py.detach(|| plan_epoch(datapoints, &settings)).map_err(to_python)?;
    let made = PyDict::new(py);
    made.set_item("order", int32_buffer(py, &plan.order, 1)?)?;
    made.set_item("row_offsets", int64_buffer(py, &plan.row_offsets)?)?;
    made.set_item("row_ranks", int32_buffer(py, &plan.row_ranks, 1)?)?;
    made.set_item("step_offsets", int64_buffer(py, &plan.step_offsets)?)?;
    let Sharing { alone, in_ranks, in_windows, at_all } = plan.sharing;
    for (name, tokens) in [("alone", alone), ("in_ranks", in_ranks), ("in_windows", in_windows), ("at_all", at_all)] {
        made.set_item(name, tokens)?;
    }
    Ok(made)
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
