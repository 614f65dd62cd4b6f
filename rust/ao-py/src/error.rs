//! The one mapping of the core's errors to Python's.

use ao_core::Error;
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyValueError};
use pyo3::{PyErr, create_exception};

create_exception!(
    ao._ao,
    AoError,
    PyValueError,
    "Bad input: the message says what, which, expected, got and what to do."
);

/// A missing file and a refusal of the operating system are Python's own errors, everything else is bad input.
pub(crate) fn to_python(error: Error) -> PyErr {
    match error {
        Error::Missing { .. } => PyFileNotFoundError::new_err(error.to_string()),
        Error::Io { .. } => PyOSError::new_err(error.to_string()),
        _ => AoError::new_err(error.to_string()),
    }
}
