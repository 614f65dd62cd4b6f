//! Writing packed data sets: sources, the writer, and the joining of parts.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ao_core::folder::Part;
use ao_core::pack::{self, Progress, Run};
use ao_core::rows::{Table, json_rows};
use ao_core::source::{self, Survey};
use ao_core::stats::SourceStats;
use ao_core::{Error, folder, frame, manifest};
use arrow_array::RecordBatch;
use arrow_pyarrow::PyArrowType;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::to_python;
use crate::frame::Framer;

/// One source of examples: surveyed if it must be, then packed.
#[pyclass(frozen, module = "ao._ao")]
pub struct Source {
    stage: Mutex<Stage>,
}

enum Stage {
    Surveyed(Survey),
    Settled(Arc<source::Source>),
    /// Between the two, should the step fail.
    Lost,
}

#[pymethods]
impl Source {
    #[new]
    fn new(settings_json: &str) -> PyResult<Self> {
        let survey = Survey::new(settings_json).map_err(to_python)?;
        Ok(Self { stage: Mutex::new(Stage::Surveyed(survey)) })
    }

    /// Whether every row must be shown to `survey` before the first is packed.
    #[getter]
    fn needs_survey(&self) -> bool {
        match &*self.locked() {
            Stage::Surveyed(survey) => survey.is_needed(),
            _ => false,
        }
    }

    fn survey(
        &self,
        py: Python<'_>,
        table_json: &str,
        batch: PyArrowType<RecordBatch>,
        first_row: usize,
    ) -> PyResult<()> {
        py.detach(|| {
            let mut stage = self.locked();
            let Stage::Surveyed(survey) = &mut *stage else {
                return Err(Error::Input("this source is settled; its survey is over".to_owned()));
            };
            let mut scratch = Vec::new();
            survey.add(&Table::from_json(table_json)?, first_row, &json_rows(&batch.0, &mut scratch)?);
            Ok(())
        })
        .map_err(to_python)
    }

    /// End the survey: how many examples the rows will give, where a count says so.
    fn settle(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        py.detach(|| {
            let mut stage = self.locked();
            match std::mem::replace(&mut *stage, Stage::Lost) {
                Stage::Surveyed(survey) => {
                    let (source, examples) = survey.settle()?;
                    *stage = Stage::Settled(Arc::new(source));
                    Ok(examples)
                }
                settled => {
                    *stage = settled;
                    Ok(None)
                }
            }
        })
        .map_err(to_python)
    }
}

impl Source {
    fn locked(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settled(&self) -> Result<Arc<source::Source>, Error> {
        match &*self.locked() {
            Stage::Settled(source) => Ok(Arc::clone(source)),
            _ => Err(Error::Input("a source must be settled before its rows are packed; call settle()".to_owned())),
        }
    }
}

/// Writes a packed data set into one folder: shards as they fill, the manifest last.
#[pyclass(frozen, module = "ao._ao")]
pub struct PackWriter {
    framer: Arc<frame::Framer>,
    inner: Mutex<pack::PackWriter>,
}

#[pymethods]
impl PackWriter {
    #[new]
    #[pyo3(signature = (folder, framer, settings_json, *, part = (0, 1), resume = false, max_errors = 0))]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        framer: &Framer,
        settings_json: &str,
        part: (usize, usize),
        resume: bool,
        max_errors: usize,
    ) -> PyResult<Self> {
        let framer = Arc::clone(&framer.inner);
        let run = Run { part: Part { index: part.0, of: part.1 }, resume, max_errors };
        let inner = py.detach(|| pack::PackWriter::new(&folder, &framer, settings_json, run)).map_err(to_python)?;
        Ok(Self { framer, inner: Mutex::new(inner) })
    }

    fn add<'py>(
        &self,
        py: Python<'py>,
        source: &Source,
        table_json: &str,
        batch: PyArrowType<RecordBatch>,
        first_row: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        let progress = py
            .detach(|| {
                let (source, table) = (source.settled()?, Table::from_json(table_json)?);
                let mut scratch = Vec::new();
                let rows = json_rows(&batch.0, &mut scratch)?;
                self.locked(|writer| writer.add(&self.framer, &source, &table, first_row, &rows).cloned())
            })
            .map_err(to_python)?;
        describe(py, &progress)
    }

    fn finish(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.locked(|writer| writer.finish(&self.framer))).map_err(to_python)
    }

    /// The counts so far.
    #[getter]
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let progress = py.detach(|| self.locked(|writer| writer.progress().clone()));
        describe(py, &progress)
    }
}

impl PackWriter {
    /// A writer that panicked has marked itself as failed, so its lock may be taken again.
    fn locked<T>(&self, work: impl FnOnce(&mut pack::PackWriter) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn describe<'py>(py: Python<'py>, progress: &Progress) -> PyResult<Bound<'py, PyDict>> {
    let SourceStats { examples, datapoints, input_tokens, unanswerable, without_donor, drops, errors, .. } =
        progress.stats.total();
    let out = PyDict::new(py);
    out.set_item("offered", progress.offered)?;
    out.set_item("skipped", progress.skipped)?;
    out.set_item("examples", examples)?;
    out.set_item("datapoints", datapoints)?;
    out.set_item("input_tokens", input_tokens)?;
    out.set_item("unanswerable", unanswerable)?;
    out.set_item("without_donor", without_donor)?;
    out.set_item("drops", drops)?;
    out.set_item("errors", errors)?;
    out.set_item("messages", &progress.messages)?;
    Ok(out)
}

/// Prove that the parts in a folder make one whole build and write its manifest.
#[pyfunction]
pub fn merge(py: Python<'_>, folder: PathBuf) -> PyResult<String> {
    py.detach(|| folder::merge(&folder)).map_err(to_python)
}

/// The xxh3-128 of a file, in hexadecimal.
#[pyfunction]
pub fn input_digest(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| manifest::xxh3_hex(&path)).map_err(to_python)
}
