//! The activation cache: keys, writer, reader and the check of a unit.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use ao_core::Error;
use ao_core::activations::index::{self, Unit};
use ao_core::activations::reader::{Mode, RowReader};
use ao_core::activations::writer::UnitWriter;
use ao_core::activations::{RowType, keys, units};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::Value;

use crate::buffers::{Buffer, bytes, bytes_mut, values};
use crate::error::to_python;
use crate::shard::{Layout, to_tuples};

/// Bytes of a key as Python holds it: its upper and its lower half, a `uint64` each.
const KEY_BYTES: usize = 16;

/// For each position of a context its key: uint64 [n, 2], upper and lower half.
#[pyfunction]
pub fn context_keys(py: Python<'_>, ids: Buffer) -> PyResult<Bound<'_, PyBytes>> {
    let ids: Vec<i32> = values::<4>(&ids, "ids", "il")?.into_iter().map(i32::from_le_bytes).collect();
    let found = py.detach(|| keys::context_keys(&ids));
    PyBytes::new_with(py, KEY_BYTES * found.len(), |out| {
        for (out, key) in out.as_chunks_mut::<KEY_BYTES>().0.iter_mut().zip(found) {
            out[..8].copy_from_slice(&((key >> 64) as u64).to_le_bytes());
            out[8..].copy_from_slice(&(key as u64).to_le_bytes());
        }
        Ok(())
    })
}

fn longs(buffer: &Buffer, what: &str) -> PyResult<Vec<i64>> {
    Ok(values::<8>(buffer, what, "lq")?.into_iter().map(i64::from_le_bytes).collect())
}

fn key(halves: &[u8; KEY_BYTES]) -> u128 {
    let half = |at: usize| u64::from_le_bytes(halves[at..at + 8].try_into().expect("eight bytes are eight bytes"));
    u128::from(half(0)) << 64 | u128::from(half(8))
}

fn contract(json: &str) -> PyResult<Value> {
    serde_json::from_str(json).map_err(|error| to_python(Error::Input(format!("the contract is not JSON: {error}"))))
}

/// Writes one unit of an activation cache.
#[pyclass(frozen, module = "ao._ao")]
pub struct ActivationWriter {
    writer: Mutex<Option<UnitWriter>>,
}

#[pymethods]
impl ActivationWriter {
    #[new]
    #[pyo3(signature = (folder, *, run, unit, contract_json, dtype, width, layers))]
    fn new(
        folder: PathBuf,
        run: String,
        unit: u32,
        contract_json: &str,
        dtype: &str,
        width: usize,
        layers: Vec<u16>,
    ) -> PyResult<Self> {
        let contract = contract(contract_json)?;
        let row = RowType::new(dtype, width).map_err(to_python)?;
        let unit = Unit { run, number: unit, contract, row };
        let writer = UnitWriter::new(&folder, unit, &layers).map_err(to_python)?;
        Ok(Self { writer: Mutex::new(Some(writer)) })
    }

    fn append(&self, py: Python<'_>, layer: u16, keys: Buffer, norms: Buffer, rows: Buffer) -> PyResult<()> {
        let (keys, rest) = bytes(&keys, "keys")?.as_chunks::<KEY_BYTES>();
        if !rest.is_empty() {
            let what = format!("keys have {} bytes too many; expected uint64 [K, 2]", rest.len());
            return Err(to_python(Error::Input(what)));
        }
        let keys: Vec<u128> = keys.iter().map(key).collect();
        let norms: Vec<f32> = values::<4>(&norms, "norms", "f")?.into_iter().map(f32::from_le_bytes).collect();
        let rows = bytes(&rows, "rows")?;
        self.with(py, |writer| writer.append(layer, &keys, &norms, rows))
    }

    /// Rows of each layer so far.
    #[getter]
    fn rows(&self, py: Python<'_>) -> PyResult<BTreeMap<u16, usize>> {
        self.with(py, |writer| Ok(writer.rows()))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.locked().take().ok_or_else(finished)?.finish()).map_err(to_python)
    }

    fn abandon(&self, py: Python<'_>) {
        py.detach(|| drop(self.locked().take()));
    }
}

impl ActivationWriter {
    fn locked(&self) -> std::sync::MutexGuard<'_, Option<UnitWriter>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without the interpreter also while waiting for another thread, which needs it to return.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut UnitWriter) -> ao_core::Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| work(self.locked().as_mut().ok_or_else(finished)?)).map_err(to_python)
    }
}

fn finished() -> Error {
    Error::Input("this writer has finished; make a new one for the next unit".to_owned())
}

/// Reads rows of one layer at random.
#[pyclass(frozen, module = "ao._ao")]
pub struct ActivationReader {
    reader: RowReader,
}

#[pymethods]
impl ActivationReader {
    #[new]
    #[pyo3(signature = (paths, *, rows, contract_json, dtype, width))]
    fn new(paths: Vec<PathBuf>, rows: Vec<u64>, contract_json: &str, dtype: &str, width: usize) -> PyResult<Self> {
        let (row, contract) = (RowType::new(dtype, width).map_err(to_python)?, contract(contract_json)?);
        let reader = RowReader::open(&paths, row).map_err(to_python)?;
        reader.require(&rows, &contract).map_err(to_python)?;
        Ok(Self { reader })
    }

    /// Number of rows in all files.
    fn __len__(&self) -> usize {
        self.reader.len()
    }

    #[pyo3(signature = (rows, out, *, mode = "auto"))]
    fn gather(&self, py: Python<'_>, rows: Buffer, mut out: Buffer, mode: &str) -> PyResult<()> {
        let (rows, mode) = (longs(&rows, "rows")?, Mode::named(mode).map_err(to_python)?);
        let out = bytes_mut(&mut out, "out")?;
        py.detach(|| self.reader.gather(&self.reader.places(&rows)?, out, mode)).map_err(to_python)
    }

    fn prefetch(&self, py: Python<'_>, rows: Buffer) -> PyResult<()> {
        let rows = longs(&rows, "rows")?;
        py.detach(|| self.reader.prefetch(&self.reader.places(&rows)?)).map_err(to_python)
    }
}

/// Of each unit: what the units of a cache have in common, run, number, rows by layer.
#[pyfunction]
#[pyo3(signature = (folder, indexes, *, headers = false))]
pub fn activation_units(
    py: Python<'_>,
    folder: PathBuf,
    indexes: Vec<String>,
    headers: bool,
) -> PyResult<Vec<UnitTuple>> {
    let found = py.detach(|| units::summaries(&folder, &indexes, headers)).map_err(to_python)?;
    Ok(found.into_iter().map(|unit| (unit.common, unit.run, unit.number, unit.rows)).collect())
}

type UnitTuple = (String, String, u32, BTreeMap<u16, usize>);

/// The arrays of an index.
#[pyfunction]
pub fn activation_arrays(py: Python<'_>, index: PathBuf) -> PyResult<Vec<Layout<'_>>> {
    to_tuples(py, py.detach(|| index::layout(&index)).map_err(to_python)?)
}

/// Check every byte of a unit against its index.
#[pyfunction]
pub fn verify_activations(py: Python<'_>, index: PathBuf) -> PyResult<()> {
    py.detach(|| index::verify(&index)).map_err(to_python)
}
