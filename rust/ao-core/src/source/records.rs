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
        Ok(example) => (example.id.clone(), Body::Context(Arc::new(asked(example)))),
        Err(error) => (serde_json::from_slice::<OnlyId>(row).map_or(fallback, |only| only.id), Body::Bad(error)),
    };
    place.unit(id, vec![0], body)
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
