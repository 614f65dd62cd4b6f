//! Framing: `Framer`, `Context` and `Prompt`.

use std::collections::BTreeMap;
use std::sync::Arc;

use ao_core::Error;
use ao_core::frame::{self, FramedContext, FramedPrompt};
use ao_core::span::{ByteSpan, CharIndex};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;

use crate::error::to_python;
use crate::int32_buffer;

/// Turns contexts, questions and answers into aligned token ids for one tokenizer and one chat template.
#[pyclass(frozen, module = "ao._ao")]
pub struct Framer {
    pub(crate) inner: Arc<frame::Framer>,
}

#[pymethods]
impl Framer {
    #[new]
    #[pyo3(signature = (tokenizer_json, chat_template, special_tokens_json, *, placeholder = " ?", date = "2025-01-01"))]
    fn new(
        py: Python<'_>,
        tokenizer_json: &str,
        chat_template: &str,
        special_tokens_json: &str,
        placeholder: &str,
        date: &str,
    ) -> PyResult<Self> {
        py.detach(|| frame::Framer::new(tokenizer_json, chat_template, special_tokens_json, placeholder, date))
            .map(|inner| Self { inner: Arc::new(inner) })
            .map_err(to_python)
    }

    #[getter]
    fn placeholder_id(&self) -> i32 {
        self.inner.placeholder_id()
    }

    #[getter]
    fn engine(&self) -> &str {
        self.inner.engine()
    }

    #[getter]
    fn end_of_turn_id(&self) -> i32 {
        self.inner.end_of_turn_id()
    }

    #[getter]
    fn fingerprint(&self) -> BTreeMap<String, String> {
        self.inner.fingerprint().clone()
    }

    #[getter]
    fn uses_date(&self) -> bool {
        self.inner.uses_date()
    }

    fn context(&self, py: Python<'_>, context_json: &str) -> PyResult<Context> {
        let framed = py.detach(|| self.inner.context(&parse(context_json, "the context")?));
        Ok(Context { framer: Arc::clone(&self.inner), framed: framed.map_err(to_python)? })
    }

    fn prompt(&self, py: Python<'_>, layers: Vec<usize>, num_positions: usize, question: &str) -> PyResult<Prompt> {
        py.detach(|| self.inner.prompt(&layers, num_positions, question))
            .map(|framed| Prompt { framed })
            .map_err(to_python)
    }

    fn answer<'py>(&self, py: Python<'py>, answer: &str) -> PyResult<Bound<'py, PyMemoryView>> {
        let ids = py.detach(|| self.inner.answer(answer)).map_err(to_python)?;
        int32_buffer(py, &ids, 1)
    }

    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyMemoryView>> {
        let ids = py.detach(|| self.inner.tokenizer().encode(text)).map_err(to_python)?;
        int32_buffer(py, &ids, 1)
    }

    fn decode(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<String> {
        let ids: Vec<i32> = match PyBuffer::<i32>::get(ids) {
            Ok(buffer) => buffer.to_vec(py)?,
            Err(_) => ids.extract()?,
        };
        py.detach(|| self.inner.tokenizer().decode(&ids)).map_err(to_python)
    }
}

/// A context as tokens.
#[pyclass(frozen, module = "ao._ao")]
pub struct Context {
    framer: Arc<frame::Framer>,
    framed: FramedContext,
}

#[pymethods]
impl Context {
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        int32_buffer(py, &self.framed.ids, 1)
    }

    #[getter]
    fn text(&self) -> &str {
        &self.framed.text
    }

    #[getter]
    fn token_spans<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        let flat = py.detach(|| self.spans(|span| Some([span.start, span.end])));
        int32_buffer(py, &flat.map_err(to_python)?, 2)
    }

    #[getter]
    fn char_spans<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        let flat = py.detach(|| {
            let index = CharIndex::new(&self.framed.text);
            self.spans(|span| index.to_chars(span).map(|span| [span.start, span.end]))
        });
        int32_buffer(py, &flat.map_err(to_python)?, 2)
    }

    fn readable<'py>(&self, py: Python<'py>, read_json: &str) -> PyResult<Bound<'py, PyMemoryView>> {
        let tokens = py.detach(|| {
            let read: Option<Vec<_>> = parse(read_json, "\"read\"")?;
            self.framer.readable(&self.framed, read.as_deref())
        });
        int32_buffer(py, &tokens.map_err(to_python)?, 1)
    }
}

impl Context {
    /// The tokens' spans in the unit of `convert`, flat.
    fn spans(&self, convert: impl Fn(ByteSpan) -> Option<[usize; 2]>) -> ao_core::Result<Vec<i32>> {
        let spans = self.framer.token_spans(&self.framed)?;
        let flat = spans.into_iter().flat_map(|span| convert(span).expect("token spans lie on character boundaries"));
        Ok(flat.map(|at| at as i32).collect())
    }
}

/// An oracle prompt as tokens.
#[pyclass(frozen, module = "ao._ao")]
pub struct Prompt {
    framed: FramedPrompt,
}

#[pymethods]
impl Prompt {
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        int32_buffer(py, &self.framed.ids, 1)
    }

    #[getter]
    fn placeholders<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        int32_buffer(py, &self.framed.placeholders, 1)
    }

    #[getter]
    fn text(&self) -> &str {
        &self.framed.text
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(json: &'a str, whose: &str) -> ao_core::Result<T> {
    serde_json::from_str(json).map_err(|error| Error::Input(format!("{whose} is not what it should be: {error}")))
}
