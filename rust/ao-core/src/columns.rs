//! Datapoints by column: the ragged arrays that a shard stores, filled without an allocation per datapoint.

use std::collections::HashMap;
use std::sync::Arc;

use crate::datapoint::ContextIds;

/// Values and the offsets that cut them into rows.
#[derive(Debug)]
pub(crate) struct Ragged<T> {
    pub(crate) values: Vec<T>,
    pub(crate) offsets: Vec<i64>,
}

impl<T> Default for Ragged<T> {
    fn default() -> Self {
        Self { values: Vec::new(), offsets: vec![0] }
    }
}

impl<T: Copy> Ragged<T> {
    pub(crate) fn push(&mut self, row: &[T]) {
        self.values.extend_from_slice(row);
        self.close();
    }

    /// End a row of the values that were added behind the last one.
    fn close(&mut self) {
        self.offsets.push(self.values.len() as i64);
    }

    pub(crate) fn row(&self, at: usize) -> &[T] {
        &self.values[self.offsets[at] as usize..self.offsets[at + 1] as usize]
    }

    /// The length of each row.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> {
        self.offsets.windows(2).map(|ends| (ends[1] - ends[0]) as usize)
    }

    fn joined<'a>(parts: impl Iterator<Item = &'a Self> + Clone) -> Self
    where
        T: 'a,
    {
        let mut joined = Self::default();
        joined.values.reserve_exact(parts.clone().map(|part| part.values.len()).sum());
        joined.offsets.reserve_exact(parts.clone().map(|part| part.offsets.len() - 1).sum());
        for part in parts {
            let before = joined.values.len() as i64;
            joined.values.extend_from_slice(&part.values);
            joined.offsets.extend(part.offsets[1..].iter().map(|end| before + end));
        }
        joined
    }
}

/// One unit of training: an oracle prompt with its answer, and where its placeholders get their vectors.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The example's id, with `@L` and the layer behind it where an example makes one datapoint per layer.
    pub id: &'a str,
    /// The source's name.
    pub source: &'a Arc<str>,
    /// The prompt.
    pub prompt_ids: &'a [i32],
    /// The answer and the end of turn.
    pub answer_ids: &'a [i32],
    /// Indices into the prompt, layer by layer.
    pub placeholders: &'a [i32],
    /// For each placeholder, the layer.
    pub layers: &'a [i16],
    /// For each placeholder, the index into `context_ids`.
    pub read_positions: &'a [i32],
    /// What the target reads, cut after the last position that is read.
    pub context_ids: &'a ContextIds,
    /// Whose activations, as [`crate::example::Kind::code`].
    pub kind: u8,
    /// The question, for people.
    pub question: &'a str,
    /// The answer, for people.
    pub answer: &'a str,
    /// The example's own `meta`, as canonical JSON.
    pub meta: &'a str,
}

/// Datapoints by column, in order.
#[derive(Debug, Default)]
pub struct Columns {
    pub(crate) ids: Ragged<u8>,
    pub(crate) questions: Ragged<u8>,
    pub(crate) answers: Ragged<u8>,
    pub(crate) metas: Ragged<u8>,
    /// Prompt, answer, end of turn.
    pub(crate) inputs: Ragged<i32>,
    /// Index of the first answer token.
    pub(crate) answer_starts: Vec<i32>,
    pub(crate) placeholders: Ragged<i32>,
    /// For each placeholder.
    pub(crate) layers: Vec<i16>,
    /// For each placeholder.
    pub(crate) read_positions: Vec<i32>,
    pub(crate) kinds: Vec<u8>,
    /// The names of sources, in the order of their first use.
    pub(crate) source_names: Vec<Arc<str>>,
    /// For each datapoint, the index of its source's name.
    pub(crate) sources: Vec<u32>,
    /// Contexts, as neighbours hold them in common.
    pub(crate) contexts: Vec<Arc<[i32]>>,
    /// For each datapoint, the index of its context.
    pub(crate) context: Vec<u32>,
    /// For each datapoint, how many tokens of its context it shows.
    pub(crate) context_lengths: Vec<i32>,
}

impl Columns {
    /// How many datapoints there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.answer_starts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.answer_starts.is_empty()
    }

    /// Add a datapoint.
    pub fn push(&mut self, row: &Row<'_>) {
        self.ids.push(row.id.as_bytes());
        self.questions.push(row.question.as_bytes());
        self.answers.push(row.answer.as_bytes());
        self.metas.push(row.meta.as_bytes());
        self.inputs.values.extend_from_slice(row.prompt_ids);
        self.inputs.push(row.answer_ids);
        self.answer_starts.push(row.prompt_ids.len() as i32);
        self.placeholders.push(row.placeholders);
        self.layers.extend_from_slice(row.layers);
        self.read_positions.extend_from_slice(row.read_positions);
        self.kinds.push(row.kind);
        if self.source_names.last() != Some(row.source) {
            self.source_names.push(Arc::clone(row.source));
        }
        self.sources.push(self.source_names.len() as u32 - 1);
        if self.contexts.last().is_none_or(|last| !Arc::ptr_eq(last, row.context_ids.whole())) {
            self.contexts.push(Arc::clone(row.context_ids.whole()));
        }
        self.context.push(self.contexts.len() as u32 - 1);
        self.context_lengths.push(row.context_ids.len() as i32);
    }

    /// The context of datapoint `at`.
    pub(crate) fn context_ids(&self, at: usize) -> &[i32] {
        &self.contexts[self.context[at] as usize][..self.context_lengths[at] as usize]
    }

    /// The read positions of datapoint `at`.
    pub(crate) fn positions(&self, at: usize) -> &[i32] {
        let ends = &self.placeholders.offsets[at..at + 2];
        &self.read_positions[ends[0] as usize..ends[1] as usize]
    }

    /// All of `parts`, one behind the other.
    #[must_use]
    pub fn joined<'a>(parts: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let flat = |column: fn(&'a Self) -> &'a [i32]| parts.clone().map(column).collect::<Vec<_>>().concat();
        let mut joined = Self {
            ids: Ragged::joined(parts.clone().map(|part| &part.ids)),
            questions: Ragged::joined(parts.clone().map(|part| &part.questions)),
            answers: Ragged::joined(parts.clone().map(|part| &part.answers)),
            metas: Ragged::joined(parts.clone().map(|part| &part.metas)),
            inputs: Ragged::joined(parts.clone().map(|part| &part.inputs)),
            answer_starts: flat(|part| &part.answer_starts),
            placeholders: Ragged::joined(parts.clone().map(|part| &part.placeholders)),
            layers: parts.clone().map(|part| part.layers.as_slice()).collect::<Vec<_>>().concat(),
            read_positions: flat(|part| &part.read_positions),
            kinds: parts.clone().map(|part| part.kinds.as_slice()).collect::<Vec<_>>().concat(),
            context_lengths: flat(|part| &part.context_lengths),
            ..Self::default()
        };
        let mut number_of: HashMap<Arc<str>, u32> = HashMap::new();
        for part in parts {
            let numbers: Vec<u32> = part
                .source_names
                .iter()
                .map(|name| {
                    *number_of.entry(Arc::clone(name)).or_insert_with(|| {
                        joined.source_names.push(Arc::clone(name));
                        joined.source_names.len() as u32 - 1
                    })
                })
                .collect();
            joined.sources.extend(part.sources.iter().map(|&own| numbers[own as usize]));
            let before = joined.contexts.len() as u32;
            joined.contexts.extend(part.contexts.iter().map(Arc::clone));
            joined.context.extend(part.context.iter().map(|own| before + own));
        }
        joined
    }
}

impl<'a> FromIterator<Row<'a>> for Columns {
    fn from_iter<I: IntoIterator<Item = Row<'a>>>(rows: I) -> Self {
        let mut columns = Self::default();
        rows.into_iter().for_each(|row| columns.push(&row));
        columns
    }
}
