//! Writing packed data sets.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ao_core::frame;
use ao_core::pack;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::to_python;
use crate::frame::Framer;

/// Writes a packed data set into one folder: shards as they fill, the manifest last.
#[pyclass(frozen, module = "ao._ao")]
pub struct PackWriter {
    framer: Arc<frame::Framer>,
    inner: Mutex<pack::PackWriter>,
}

#[pymethods]
impl PackWriter {
    #[new]
    fn new(py: Python<'_>, out_dir: PathBuf, framer: &Framer, settings_json: &str) -> PyResult<Self> {
        let framer = Arc::clone(&framer.inner);
        let inner = py.detach(|| pack::PackWriter::new(&out_dir, &framer, settings_json)).map_err(to_python)?;
        Ok(Self { framer, inner: Mutex::new(inner) })
    }

    fn add<'py>(&self, py: Python<'py>, source_json: &str, examples_jsonl: &[u8]) -> PyResult<Bound<'py, PyDict>> {
        let counts = py
            .detach(|| self.locked(|writer| writer.add(&self.framer, source_json, examples_jsonl)))
            .map_err(to_python)?;
        let out = PyDict::new(py);
        out.set_item("examples", counts.examples)?;
        out.set_item("datapoints", counts.datapoints)?;
        out.set_item("tokens", counts.tokens)?;
        out.set_item("drops", counts.drops)?;
        Ok(out)
    }

    fn finish(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.locked(pack::PackWriter::finish)).map_err(to_python)
    }
}

impl PackWriter {
    /// A writer that panicked has marked itself as failed, so its lock may be taken again.
    fn locked<T>(&self, work: impl FnOnce(&mut pack::PackWriter) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
