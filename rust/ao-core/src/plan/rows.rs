//! Rows: which examples lie together in one forward pass of a token budget.
//!
//! Examples are never cut. One budget alone is filled to the last token wherever the lengths allow it (`exact`); with a
//! second budget or a limit on examples a search among the next ones does it (`several`).

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::exact;
use super::several;
use crate::error::{Error, Result};

/// Examples that are enough to find among them what fits.
const MIXTURE: usize = 4096;

/// What a row may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowLimits {
    /// Tokens of its examples' inputs.
    pub tokens: usize,
    /// Tokens of its examples' contexts, each example's own counted, shared or not.
    pub context_tokens: Option<usize>,
    /// Examples.
    pub examples: Option<usize>,
    /// How the row is laid out.
    pub layout: Layout,
    /// What becomes of an example that is longer than a row.
    pub longer: Longer,
}

impl RowLimits {
    /// Packed rows of `tokens`, without other limits; an example longer than that is an error.
    #[must_use]
    pub fn of_tokens(tokens: usize) -> Self {
        Self { tokens, context_tokens: None, examples: None, layout: Layout::Packed, longer: Longer::Refuse }
    }
}

/// How examples lie in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One behind the other: a row costs the sum of its lengths.
    Packed,
    /// Padded to a rectangle: a row costs its longest length times its examples.
    Padded,
}

/// What becomes of an example that exceeds a budget by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Longer {
    /// It is an error.
    Refuse,
    /// It gets a row of its own, the only kind of row that exceeds a budget.
    Alone,
}

/// Which examples a row may be filled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// All.
    All,
    /// Those that stand first among the ones without a row, so many; the very first is always in the next row.
    Next(usize),
}

/// Examples in the order of their rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rows {
    /// Indices of examples, each once.
    pub order: Vec<i32>,
    /// Where each row begins in `order`, and the end of the last.
    pub offsets: Vec<i64>,
}

impl Rows {
    pub(super) fn new() -> Self {
        Self { order: Vec::new(), offsets: vec![0] }
    }

    pub(super) fn end_row(&mut self) {
        self.offsets.push(self.order.len() as i64);
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The examples of each row.
    pub fn iter(&self) -> impl Iterator<Item = &[i32]> {
        self.offsets.windows(2).map(|ends| &self.order[ends[0] as usize..ends[1] as usize])
    }
}

/// Lay examples out in rows.
///
/// `lengths` are the tokens of each example, `context_lengths` those of its context; they may be left out (empty) where
/// the limits name no context budget. With [`Reach::All`] the number of rows is at most that of best fit decreasing
/// wherever that would leave more than a thousandth of the tokens unused. The result depends on the arguments alone.
///
/// # Errors
/// If a limit is zero, a length is negative, the lists differ in length, or, with [`Longer::Refuse`], an example exceeds
/// a budget by itself.
pub fn pack_rows(lengths: &[i32], context_lengths: &[i32], limits: RowLimits, reach: Reach) -> Result<Rows> {
    check(lengths, context_lengths, limits, reach)?;
    Ok(pack(lengths, context_lengths, limits, reach))
}

/// As `pack_rows`, for arguments that were checked.
pub(super) fn pack(lengths: &[i32], context_lengths: &[i32], limits: RowLimits, reach: Reach) -> Rows {
    if fits_one_row(lengths, context_lengths, limits) {
        let mut rows = Rows { order: (0..lengths.len() as i32).collect(), offsets: vec![0] };
        rows.end_row();
        return rows;
    }
    if limits.layout == Layout::Padded {
        return padded(lengths, context_lengths, limits, reach);
    }
    let contexts = limits.context_tokens.map(|_| context_lengths);
    let one_budget = contexts.is_none() && limits.examples.is_none();
    // The exact way has tables as long as the budget, which a few examples are not worth.
    let exact = one_budget && limits.tokens <= 64 * lengths.len();
    let pack = |reach| {
        if exact { exact::pack(lengths, limits.tokens, reach) } else { several::pack(lengths, contexts, limits, reach) }
    };
    let mut rows = pack(reach);
    let fewer = |rows: Rows, other: Rows| if other.len() < rows.len() { other } else { rows };
    // With all in reach the lengths that fit well may be used up early; a window keeps the mixture as it is.
    if reach == Reach::All && exact && wastes(&rows, lengths, contexts, limits) {
        rows = fewer(rows, pack(Reach::Next(MIXTURE)));
    }
    let affordable = one_budget || lengths.len() <= MIXTURE;
    if reach == Reach::All && affordable && wastes(&rows, lengths, contexts, limits) {
        rows = fewer(rows, best_fit_decreasing(lengths, contexts, limits));
    }
    rows
}

/// Whether fewer rows might do, by more than a thousandth.
fn wastes(rows: &Rows, lengths: &[i32], contexts: Option<&[i32]>, limits: RowLimits) -> bool {
    let least = |lengths: &[i32], budget: usize| sum(lengths).div_ceil(budget);
    let halves = lengths.iter().filter(|&&length| 2 * length as usize > limits.tokens).count();
    let by_contexts = contexts.zip(limits.context_tokens).map_or(0, |(contexts, budget)| least(contexts, budget));
    let by_examples = limits.examples.map_or(0, |most| lengths.len().div_ceil(most));
    let least = least(lengths, limits.tokens).max(halves).max(by_contexts).max(by_examples);
    rows.len() > least + least / 1000
}

/// The longest first, each into the row that has the least room for it.
fn best_fit_decreasing(lengths: &[i32], contexts: Option<&[i32]>, limits: RowLimits) -> Rows {
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|&at| Reverse(lengths[at]));
    let most = limits.examples.unwrap_or(usize::MAX);
    let mut rows: Vec<(Vec<i32>, usize)> = Vec::new();
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for at in by_length {
        let (length, context) = (lengths[at] as usize, contexts.map_or(0, |contexts| contexts[at] as usize));
        let found = rooms.range((length, 0)..).find(|&&(_, row)| rows[row].1 >= context).copied();
        let (room, row) = found.unwrap_or((limits.tokens.max(length), rows.len()));
        if found.is_some() {
            rooms.remove(&(room, row));
        } else {
            rows.push((Vec::new(), limits.context_tokens.unwrap_or(0).max(context)));
        }
        rows[row].0.push(at as i32);
        rows[row].1 -= context;
        // Above a budget an example stands alone, whatever room is left beside it.
        let alone = length > limits.tokens || limits.context_tokens.is_some_and(|budget| context > budget);
        if rows[row].0.len() < most && !alone {
            rooms.insert((room - length, row));
        }
    }
    joined(rows.into_iter().map(|(row, _)| row))
}

fn joined(rows: impl Iterator<Item = Vec<i32>>) -> Rows {
    let mut joined = Rows::new();
    for row in rows {
        joined.order.extend(row);
        joined.end_row();
    }
    joined
}

/// Rectangles: like lengths lie together. Within a reach, that many examples are sorted at a time.
fn padded(lengths: &[i32], context_lengths: &[i32], limits: RowLimits, reach: Reach) -> Rows {
    let mut rows = Rows::new();
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let reach = match reach {
        Reach::All => lengths.len(),
        Reach::Next(count) => count,
    };
    for part in order.chunks_mut(reach.max(1)) {
        part.sort_by_key(|&at| Reverse(lengths[at]));
        let (mut longest, mut examples, mut contexts) = (0, 0, 0);
        for &at in &*part {
            let context = limits.context_tokens.map_or(0, |_| context_lengths[at] as usize);
            let full = (examples + 1) * longest > limits.tokens
                || limits.context_tokens.is_some_and(|budget| contexts + context > budget)
                || limits.examples.is_some_and(|most| examples == most);
            if full && examples > 0 {
                rows.end_row();
                (examples, contexts) = (0, 0);
            }
            if examples == 0 {
                longest = lengths[at] as usize;
            }
            rows.order.push(at as i32);
            examples += 1;
            contexts += context;
        }
        rows.end_row();
    }
    rows
}

fn sum(lengths: &[i32]) -> usize {
    lengths.iter().map(|&length| length as usize).sum()
}

fn fits_one_row(lengths: &[i32], context_lengths: &[i32], limits: RowLimits) -> bool {
    let tokens = match limits.layout {
        Layout::Packed => sum(lengths),
        Layout::Padded => lengths.len() * lengths.iter().max().map_or(0, |&longest| longest as usize),
    };
    !lengths.is_empty()
        && tokens <= limits.tokens
        && limits.context_tokens.is_none_or(|budget| sum(context_lengths) <= budget)
        && limits.examples.is_none_or(|most| lengths.len() <= most)
}

fn check(lengths: &[i32], context_lengths: &[i32], limits: RowLimits, reach: Reach) -> Result<()> {
    check_limits(limits)?;
    if reach == Reach::Next(0) {
        return Err(Error::Plan("the window of a row must be at least 1, got 0".to_owned()));
    }
    if i32::try_from(lengths.len()).is_err() {
        return Err(Error::Plan(format!("{} examples are more than an order can number", lengths.len())));
    }
    if limits.context_tokens.is_some() && context_lengths.len() != lengths.len() {
        return Err(Error::Plan(format!(
            "with a context budget every example needs a context length, got {} for {} examples",
            context_lengths.len(),
            lengths.len()
        )));
    }
    check_fit(lengths, "tokens", Some(limits.tokens), limits.longer)?;
    check_fit(context_lengths, "context tokens", limits.context_tokens, limits.longer)
}

pub(super) fn check_limits(limits: RowLimits) -> Result<()> {
    let zero = limits.tokens == 0 || limits.context_tokens == Some(0) || limits.examples == Some(0);
    if zero || i32::try_from(limits.tokens.max(limits.context_tokens.unwrap_or(0))).is_err() {
        return Err(Error::Plan(format!(
            "the budgets and the examples of a row must be at least 1 and below 2**31, got tokens {}, context tokens {:?}, \
             examples {:?}",
            limits.tokens, limits.context_tokens, limits.examples
        )));
    }
    Ok(())
}

/// Refuse negative lengths, and those above the budget unless they may stand alone.
pub(super) fn check_fit(lengths: &[i32], what: &str, budget: Option<usize>, longer: Longer) -> Result<()> {
    let most = budget.filter(|_| longer == Longer::Refuse).map_or(i32::MAX, |budget| budget as i32);
    let Some(at) = lengths.iter().position(|&length| !(0..=most).contains(&length)) else { return Ok(()) };
    if lengths[at] < 0 {
        return Err(Error::Plan(format!("a length is negative: {} {what} at index {at}", lengths[at])));
    }
    let others = lengths[at + 1..].iter().filter(|&&length| length > most).count();
    Err(Error::Plan(format!(
        "example {at} has {} {what}, more than the {most} of a row, and so have {others} after it; raise the budget, drop \
         them when packing, or let each have a row of its own",
        lengths[at]
    )))
}
