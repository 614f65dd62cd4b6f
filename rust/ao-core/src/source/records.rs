//! Records: rows that are examples already.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::{About, Asked, Body, RowPlace, Source, Unit};
use crate::datapoint::Question;
use crate::error::{Error, Result};
use crate::example::{Example, Kind, Layer, Positions};

/// What an example holds beside its context.
pub(crate) struct Record {
    source: Option<String>,
    question: Option<String>,
    answer: Option<String>,
    pub(crate) positions: Option<Positions>,
    layers: Option<Vec<Layer>>,
    target: Kind,
    meta: serde_json::Map<String, Value>,
}

/// What can be told of a row that is no example.
#[derive(Deserialize)]
struct OnlyId {
    id: String,
}

/// The one unit of a row. One that cannot be read keeps its id where it has one, so that a `count` draws it the same.
pub(super) fn unit(place: &RowPlace<'_>, fallback: String, row: &[u8]) -> Unit {
    let (id, body) = match place.parse::<Example>(row) {
        Ok(example) if example.id.is_empty() => {
            (fallback, Body::Bad(place.error("bad_field", "the id is empty; give each example its own")))
        }
        Ok(example) => {
            let id = example.id.clone();
            let body = match rounded(&example.meta, row) {
                Some(number) => Body::Bad(place.error(
                    "bad_field",
                    format!("\"meta\" has the whole number {number}, which does not fit 64 bits; write it as text"),
                )),
                None => Body::Context(Arc::new(asked(example))),
            };
            (id, body)
        }
        Err(error) => (serde_json::from_slice::<OnlyId>(row).map_or(fallback, |only| only.id), Body::Bad(error)),
    };
    place.unit(id, vec![0], body)
}

/// A whole number of `row` that `meta` could only hold as a fraction, which rounds it.
fn rounded<'a>(meta: &serde_json::Map<String, Value>, row: &'a [u8]) -> Option<&'a str> {
    const LEAST: f64 = (1u64 << 63) as f64;
    fn is_wide(value: &Value) -> bool {
        match value {
            Value::Number(number) => number.is_f64() && number.as_f64().is_some_and(|number| number.abs() >= LEAST),
            Value::Array(items) => items.iter().any(is_wide),
            Value::Object(fields) => fields.values().any(is_wide),
            _ => false,
        }
    }
    // Hardly any row has such a number, and only its text tells how it was written.
    if !meta.values().any(is_wide) {
        return None;
    }
    let mut rest = std::str::from_utf8(row).ok()?;
    while let Some(at) = rest.find(|character: char| character == '"' || character == '-' || character.is_ascii_digit())
    {
        let is_text = rest[at..].starts_with('"');
        let from = &rest[at..];
        let end = if is_text { text_end(from) } else { from.find([',', ']', '}', ' ', '\t', '\r', '\n']) };
        let (token, behind) = from.split_at(end.unwrap_or(from.len()));
        let is_whole = !is_text && !token.contains(['.', 'e', 'E']);
        if is_whole && token.parse::<i64>().is_err() && token.parse::<u64>().is_err() {
            return Some(token);
        }
        rest = behind;
    }
    None
}

/// Where a JSON text that begins with its quote ends.
fn text_end(text: &str) -> Option<usize> {
    let mut is_escaped = true;
    text.find(|character| {
        let is_end = character == '"' && !is_escaped;
        is_escaped = character == '\\' && !is_escaped;
        is_end
    })
    .map(|at| at + 1)
}

fn asked(example: Example) -> Asked {
    let Example { id: _, source, context, read, question, answer, positions, layers, target, meta } = example;
    let record = Record { source, question, answer, positions, layers, target, meta };
    Asked { context, read, label: None, about: About::Record(Box::new(record)) }
}

impl Record {
    pub(super) fn question(&self, source: &Source, id: String) -> Result<Question> {
        let given = |field: &str, value: &Option<String>| {
            value.clone().ok_or_else(|| {
                Error::input(format!(
                    "the field {field:?} is missing; give it, or pack the contexts as \"context_prediction\""
                ))
            })
        };
        Ok(Question {
            id,
            source: self.source.as_deref().map_or_else(|| source.name.clone(), Arc::from),
            text: given("question", &self.question)?,
            answer: given("answer", &self.answer)?,
            layers: self.layers.clone(),
            target: self.target,
            meta: self.meta.clone(),
        })
    }
}
