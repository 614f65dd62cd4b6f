//! Views of Python's buffers, for work without the interpreter. The only unsafe code of the project is here.

use ao_core::Error;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use crate::error::to_python;

/// Something of Python's that has a buffer: an array, a memoryview, bytes.
pub(crate) struct Buffer(PyUntypedBuffer);

impl<'a, 'py> FromPyObject<'a, 'py> for Buffer {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        PyUntypedBuffer::get(&object).map(Self)
    }
}

/// The bytes of a contiguous buffer, while it is held.
pub(crate) fn bytes<'a>(Buffer(buffer): &'a Buffer, what: &str) -> PyResult<&'a [u8]> {
    require_contiguous(buffer, what)?;
    if buffer.len_bytes() == 0 {
        return Ok(&[]);
    }
    // The buffer protocol keeps the memory in place until `buffer` is dropped. A caller that writes into an array while it
    // is being read would change the bytes, as with any reader of buffers; they are only copied and hashed here.
    #[expect(unsafe_code, reason = "the safe ways to a buffer's bytes copy them, or hold the interpreter")]
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) })
}

/// The same, to be written.
pub(crate) fn bytes_mut<'a>(Buffer(buffer): &'a mut Buffer, what: &str) -> PyResult<&'a mut [u8]> {
    require_contiguous(buffer, what)?;
    if buffer.readonly() {
        return Err(to_python(Error::Input(format!("{what} is read-only; expected a buffer that can be written"))));
    }
    if buffer.len_bytes() == 0 {
        return Ok(&mut []);
    }
    // As above; `&mut` keeps this from being handed out twice.
    #[expect(unsafe_code, reason = "the safe ways into a buffer copy, or hold the interpreter")]
    Ok(unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) })
}

fn require_contiguous(buffer: &PyUntypedBuffer, what: &str) -> PyResult<()> {
    if buffer.is_c_contiguous() {
        return Ok(());
    }
    Err(to_python(Error::Input(format!("{what} is not contiguous; copy it with numpy.ascontiguousarray"))))
}

/// The little-endian values of a buffer, of `N` bytes each and one of `types` as Python's `struct` calls them.
pub(crate) fn values<const N: usize>(of: &Buffer, what: &str, types: &str) -> PyResult<Vec<[u8; N]>> {
    let bytes = bytes(of, what)?;
    let Buffer(buffer) = of;
    let found = buffer.format().to_string_lossy();
    if buffer.item_size() != N || !types.contains(found.trim_start_matches(['<', '=', '@'])) {
        return Err(to_python(Error::Input(format!(
            "{what} has values of {} bytes and type {found:?}; expected {N} and one of {types:?}",
            buffer.item_size()
        ))));
    }
    Ok(bytes.as_chunks::<N>().0.to_vec())
}
