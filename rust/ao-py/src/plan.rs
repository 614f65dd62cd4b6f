//! The order of training.

use ao_core::plan::{PlanSettings, plan as plan_epoch};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;

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
