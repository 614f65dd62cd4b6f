//! `LatentQA`'s published layout (arXiv 2412.08686): stimuli with labels, and questions and answers about each label.
//!
//! What the oracle may read is what follows the turns that state the label outright, as in the published loaders: of
//! `system` everything from the user's turn on; of `control` everything, the instruction itself; of `stimulus` and
//! `stimulus_completion` everything from the third turn on.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{About, Asked, RowPlace, Source};
use crate::datapoint::Question;
use crate::error::{Error, Result};
use crate::example::{Context, Kind, Message, Read};
use crate::sample::Draws;

/// One type of stimulus.
struct Type {
    name: &'static str,
    /// Role and field of each turn.
    turns: &'static [(&'static str, &'static str)],
    /// The first turn that is read; 0: everything is.
    first_read: usize,
}

const TYPES: [Type; 4] = [
    Type { name: "system", turns: &[("system", "system"), ("user", "stimulus_user")], first_read: 1 },
    Type { name: "control", turns: &[("user", "control_user")], first_read: 0 },
    Type {
        name: "stimulus",
        turns: &[("user", "control_user"), ("assistant", "control_model"), ("user", "stimulus_user")],
        first_read: 2,
    },
    Type {
        name: "stimulus_completion",
        turns: &[
            ("user", "control_user"),
            ("assistant", "control_model"),
            ("user", "stimulus_user"),
            ("assistant", "stimulus_model"),
        ],
        first_read: 2,
    },
];

/// The questions of all labels.
#[derive(Debug)]
pub(crate) struct LatentQa {
    pub(crate) questions: HashMap<String, Vec<(String, String)>>,
    pub(crate) per_stimulus: Option<usize>,
}

impl LatentQa {
    /// Which of its label's questions a stimulus is asked, and the stimulus.
    pub(super) fn asked(&self, place: &RowPlace<'_>, id: &str, row: &[u8]) -> Result<(Vec<u32>, Asked)> {
        let row: Map<String, Value> = place.parse(row)?;
        let kind = place.table.r#type.as_deref().unwrap_or_default();
        let Some(Type { turns, first_read, .. }) = TYPES.iter().find(|known| known.name == kind) else {
            let names = TYPES.map(|known| known.name);
            return Err(Error::settings(format!("a LatentQA table has type {kind:?}; expected one of {names:?}")));
        };
        let messages = turns
            .iter()
            .map(|&(role, field)| Ok(Message { role: role.to_owned(), content: place.text(&row, field)? }))
            .collect::<Result<Vec<_>>>()?;
        let label = place.text(&row, "label")?;
        let read =
            (*first_read > 0).then(|| vec![Read { message: Some(*first_read), start: None, end: None, onwards: true }]);
        let examples = self.drawn(place.source, id, self.questions.get(&label).map_or(0, Vec::len));
        let about = About::Stimulus { kind: kind.to_owned() };
        Ok((examples, Asked { context: Context::Messages(messages), read, label: Some(label), about }))
    }

    /// The questions with the smallest keys, in order.
    fn drawn(&self, source: &Source, id: &str, available: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..available as u32).collect();
        if let Some(count) = self.per_stimulus.filter(|&count| count < available) {
            all.sort_by_cached_key(|at| Draws::new(source.seed, &format!("{id}/{at}"), "question").bits());
            all.truncate(count);
            all.sort_unstable();
        }
        all
    }

    pub(super) fn question(&self, source: &Source, id: String, at: u32, label: &str, kind: &str) -> Question {
        let (question, answer) = &self.questions[label][at as usize];
        Question {
            id,
            source: source.name.clone(),
            text: question.clone(),
            answer: answer.clone(),
            layers: None,
            target: Kind::Base,
            meta: Map::from_iter([("label", label), ("type", kind)].map(|(key, value)| (key.to_owned(), json!(value)))),
        }
    }
}
