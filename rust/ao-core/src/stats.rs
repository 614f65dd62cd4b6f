//! What a data set holds, counted shard by shard. A shard's header has its own counts; the manifest adds them up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::columns::Columns;
use crate::datapoint::Kept;

/// Upper bounds, exclusive, of the buckets in which lengths are counted; what is longer goes into one bucket more.
pub const LENGTH_EDGES: [usize; 15] = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192];

type Counted = BTreeMap<String, u64>;

/// Counts of one source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStats {
    /// Examples that its rows gave.
    pub offered: u64,
    /// Those that were kept.
    pub examples: u64,
    /// Datapoints made of them.
    pub datapoints: u64,
    /// Tokens of prompts and answers.
    pub input_tokens: u64,
    /// Tokens that are learned: answers and ends of turn.
    pub answer_tokens: u64,
    /// Tokens of the contexts, each counted for every datapoint that reads it.
    pub context_tokens_read: u64,
    /// Datapoints whose context does not tell the answer, as their `meta` says.
    pub unanswerable: u64,
    /// Datapoints that were to be so, but kept their own context, as no other was found.
    pub without_donor: u64,
    /// Examples left out, by reason.
    pub drops: Counted,
    /// Rows passed over because they cannot be used, by reason; what else they offer is among the drops.
    pub errors: Counted,
    /// Datapoints by answer, where answers are labels.
    pub answers: Counted,
}

/// Counts of a shard or of a whole data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Stored contexts.
    pub contexts: u64,
    /// Their tokens.
    pub context_tokens: u64,
    /// Placeholders.
    pub placeholders: u64,
    /// Datapoints that repeat another one of the same shard: the same input, context and positions.
    pub duplicates: u64,
    /// Datapoints by input tokens, as [`LENGTH_EDGES`] bounds them.
    pub input_lengths: Vec<u64>,
    /// Datapoints by context tokens.
    pub context_lengths: Vec<u64>,
    /// By source.
    pub sources: BTreeMap<String, SourceStats>,
}

impl SourceStats {
    pub(crate) fn drop_one(&mut self, reason: &str) {
        add_one(counted(&mut self.drops, reason), 1);
    }

    pub(crate) fn pass_over(&mut self, reason: &str) {
        add_one(counted(&mut self.errors, reason), 1);
    }

    pub(crate) fn keep(&mut self, kept: &Kept, counts_answers: bool) {
        let (num_datapoints, num_answer_tokens) = (kept.prompts.len() as u64, kept.answer_ids.len() as u64);
        self.examples += 1;
        self.datapoints += num_datapoints;
        self.unanswerable += u64::from(kept.is_unanswerable()) * num_datapoints;
        self.without_donor += u64::from(kept.lacks_donor) * num_datapoints;
        self.input_tokens +=
            kept.prompts.iter().map(|(_, prompt)| prompt.ids.len() as u64 + num_answer_tokens).sum::<u64>();
        self.answer_tokens += num_answer_tokens * num_datapoints;
        self.context_tokens_read += kept.context_ids.len() as u64 * num_datapoints;
        if counts_answers {
            add_one(counted(&mut self.answers, &kept.question.answer), num_datapoints);
        }
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.offered, other.offered),
            (&mut self.examples, other.examples),
            (&mut self.datapoints, other.datapoints),
            (&mut self.input_tokens, other.input_tokens),
            (&mut self.answer_tokens, other.answer_tokens),
            (&mut self.context_tokens_read, other.context_tokens_read),
            (&mut self.unanswerable, other.unanswerable),
            (&mut self.without_donor, other.without_donor),
        ] {
            add_one(mine, theirs);
        }
        for (mine, theirs) in
            [(&mut self.drops, &other.drops), (&mut self.errors, &other.errors), (&mut self.answers, &other.answers)]
        {
            add_counted(mine, theirs);
        }
    }
}

impl Stats {
    pub(crate) fn source(&mut self, name: &str) -> &mut SourceStats {
        counted(&mut self.sources, name)
    }

    /// Count the lengths of what a shard holds.
    pub(crate) fn measure(&mut self, columns: &Columns) {
        self.input_lengths = histogram(columns.inputs.lengths());
        self.context_lengths = histogram(columns.context_lengths.iter().map(|&length| length as usize));
    }

    /// Whether these can be the counts of a shard with so many datapoints.
    pub(crate) fn are_of(&self, rows: usize) -> bool {
        let is_histogram = |lengths: &[u64]| {
            lengths.len() == LENGTH_EDGES.len() + 1
                && lengths.iter().try_fold(0, |sum: u64, &count| sum.checked_add(count)) == Some(rows as u64)
        };
        is_histogram(&self.input_lengths)
            && is_histogram(&self.context_lengths)
            && self.total().datapoints == rows as u64
    }

    /// Add another shard's counts.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.contexts, other.contexts),
            (&mut self.context_tokens, other.context_tokens),
            (&mut self.placeholders, other.placeholders),
            (&mut self.duplicates, other.duplicates),
        ] {
            add_one(mine, theirs);
        }
        for (mine, theirs) in
            [(&mut self.input_lengths, &other.input_lengths), (&mut self.context_lengths, &other.context_lengths)]
        {
            mine.resize(mine.len().max(theirs.len()), 0);
            mine.iter_mut().zip(theirs).for_each(|(mine, &theirs)| add_one(mine, theirs));
        }
        for (name, source) in &other.sources {
            self.source(name).add(source);
        }
    }

    /// The sum of the sources.
    #[must_use]
    pub fn total(&self) -> SourceStats {
        let mut total = SourceStats::default();
        self.sources.values().for_each(|source| total.add(source));
        total
    }
}

/// What stands under `name`; a name is copied only where it is new.
fn counted<'a, T: Default>(counts: &'a mut BTreeMap<String, T>, name: &str) -> &'a mut T {
    if !counts.contains_key(name) {
        counts.insert(name.to_owned(), T::default());
    }
    counts.get_mut(name).expect("it is there now")
}

fn histogram(lengths: impl Iterator<Item = usize>) -> Vec<u64> {
    let mut buckets = vec![0; LENGTH_EDGES.len() + 1];
    lengths.for_each(|length| buckets[LENGTH_EDGES.partition_point(|&edge| edge <= length)] += 1);
    buckets
}

fn add_counted(mine: &mut Counted, theirs: &Counted) {
    for (reason, count) in theirs {
        add_one(counted(mine, reason), *count);
    }
}

/// No build counts that far, but a damaged header may.
fn add_one(mine: &mut u64, theirs: u64) {
    *mine = mine.saturating_add(theirs);
}
