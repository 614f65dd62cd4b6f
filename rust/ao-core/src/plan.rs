//! Which datapoints make each training step, in which rows, and which rank takes them.
//!
//! Groups of datapoints that share a context are shuffled, not datapoints. A group falls into one window of steps and
//! is spread over it, so that a context is run once per window and still a step sees many contexts. A step is a number
//! of datapoints, or a number of rows of a token budget. Which step a datapoint is in knows nothing of ranks.

mod exact;
mod examples;
mod lanes;
mod rows;
mod several;
mod sharing;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::sample::Draws;

pub use rows::{Layout, Longer, Reach, RowLimits, Rows, pack_rows};
pub use sharing::Sharing;

/// What a plan knows of each datapoint; the lists are equally long.
#[derive(Debug, Clone, Copy)]
pub struct Datapoints<'a> {
    /// Tokens of the input.
    pub lengths: &'a [i32],
    /// Tokens of the context.
    pub context_lengths: &'a [i32],
    /// Equal where datapoints share a context.
    pub groups: &'a [i64],
}

/// What a plan is made for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSettings {
    /// Datapoints of one optimizer step over all ranks; or else `tokens_per_step`.
    #[serde(default)]
    pub examples_per_step: Option<usize>,
    /// Tokens of one step over all ranks: a step is as many rows as this is times `tokens_per_row`.
    #[serde(default)]
    pub tokens_per_step: Option<usize>,
    /// Budget of a row.
    pub tokens_per_row: usize,
    /// Second budget of a row, of its datapoints' context tokens, each datapoint's own counted.
    #[serde(default)]
    pub context_tokens_per_row: Option<usize>,
    /// Most datapoints of a row.
    #[serde(default)]
    pub examples_per_row: Option<usize>,
    /// Rows are rectangles, not sequences joined.
    #[serde(default)]
    pub padded: bool,
    /// A datapoint above a row's budget gets a row of its own; else it is an error.
    #[serde(default)]
    pub longer_alone: bool,
    /// Steps of one window.
    pub window: usize,
    /// Ranks that divide each step.
    pub ranks: usize,
    /// Keys the shuffle.
    pub seed: u64,
    /// Keys the shuffle too.
    pub epoch: u64,
}

impl PlanSettings {
    /// Read settings from a JSON object.
    ///
    /// # Errors
    /// If a field is unknown, missing or of another type.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json)
            .map_err(|error| Error::Plan(format!("the settings are not what they should be: {error}")))
    }

    fn limits(&self) -> RowLimits {
        RowLimits {
            tokens: self.tokens_per_row,
            context_tokens: self.context_tokens_per_row,
            examples: self.examples_per_row,
            layout: if self.padded { Layout::Padded } else { Layout::Packed },
            longer: if self.longer_alone { Longer::Alone } else { Longer::Refuse },
        }
    }
}

/// What one step takes: datapoints or rows.
enum Step {
    Examples(usize),
    Rows(usize),
}

/// One epoch: datapoints by step, in it by rank, in it by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Datapoints, each at most once.
    pub order: Vec<i32>,
    /// Where each row begins in `order`, and the end of the last.
    pub row_offsets: Vec<i64>,
    /// The rank of each row, not falling within a step.
    pub row_ranks: Vec<i32>,
    /// Where each step begins in the rows, and the end of the last.
    pub step_offsets: Vec<i64>,
    /// How much is saved by running the context of several datapoints once.
    pub sharing: Sharing,
}

/// Plan one epoch. What does not fill a last step is left out.
///
/// The datapoints of each step depend on everything in the settings but the ranks.
///
/// # Errors
/// If a setting cannot be used, the lists differ in length, or a datapoint exceeds a row and may not stand alone.
pub fn plan(datapoints: Datapoints, settings: &PlanSettings) -> Result<Plan> {
    let step = check(datapoints, settings)?;
    let mut draws = Draws::new(settings.seed, &settings.epoch.to_string(), "plan");
    let groups = Groups::of(datapoints.groups);
    let shuffled = groups.shuffled(&mut draws);
    let mut plan = Plan {
        order: Vec::with_capacity(datapoints.lengths.len()),
        row_offsets: vec![0],
        row_ranks: Vec::new(),
        step_offsets: vec![0],
        sharing: Sharing::default(),
    };
    match step {
        Step::Examples(count) => examples::plan(&mut plan, datapoints, settings, count, &groups, shuffled, &mut draws),
        Step::Rows(count) => lanes::plan(&mut plan, datapoints, settings, count, &shuffled, &mut draws),
    }
    plan.sharing = sharing::measure(&plan, datapoints.context_lengths, &groups, settings.window);
    Ok(plan)
}

impl Plan {
    fn push_row(&mut self, row: impl IntoIterator<Item = i32>, rank: usize) {
        self.order.extend(row);
        self.row_offsets.push(self.order.len() as i64);
        self.row_ranks.push(rank as i32);
    }

    fn end_step(&mut self) {
        self.step_offsets.push(self.row_ranks.len() as i64);
    }

    /// How many steps there are.
    #[must_use]
    pub fn num_steps(&self) -> usize {
        self.step_offsets.len() - 1
    }

    /// The datapoints of a row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[i32] {
        &self.order[self.row_offsets[row] as usize..self.row_offsets[row + 1] as usize]
    }

    /// The rows of a step.
    #[must_use]
    pub fn step(&self, step: usize) -> std::ops::Range<usize> {
        self.step_offsets[step] as usize..self.step_offsets[step + 1] as usize
    }
}

fn check(datapoints: Datapoints, settings: &PlanSettings) -> Result<Step> {
    let Datapoints { lengths, context_lengths, groups } = datapoints;
    let count = lengths.len();
    if context_lengths.len() != count || groups.len() != count {
        return Err(Error::Plan(format!(
            "lengths, context_lengths and groups must be equally long, got {count}, {} and {}",
            context_lengths.len(),
            groups.len()
        )));
    }
    if i32::try_from(count).is_err() {
        return Err(Error::Plan(format!("{count} datapoints are more than an order can number")));
    }
    let limits = settings.limits();
    rows::check_limits(limits)?;
    rows::check_fit(lengths, "tokens", Some(limits.tokens), limits.longer)?;
    rows::check_fit(context_lengths, "context tokens", limits.context_tokens, limits.longer)?;
    if settings.window == 0 || settings.ranks == 0 {
        return Err(Error::Plan(format!(
            "window and ranks must be at least 1, got window {}, ranks {}",
            settings.window, settings.ranks
        )));
    }
    check_step(settings)
}

fn check_step(settings: &PlanSettings) -> Result<Step> {
    let ranks = settings.ranks;
    match (settings.examples_per_step, settings.tokens_per_step) {
        (Some(examples), None) if examples >= ranks => Ok(Step::Examples(examples)),
        (Some(examples), None) => {
            Err(Error::Plan(format!("examples_per_step must be at least ranks = {ranks}, got {examples}")))
        }
        (None, Some(tokens)) => {
            let unit = settings.tokens_per_row.saturating_mul(ranks);
            if tokens == 0 || tokens % unit != 0 {
                return Err(Error::Plan(format!(
                    "tokens_per_step must be a multiple of tokens_per_row * ranks = {unit}, so that every rank has as \
                     many rows, got {tokens}"
                )));
            }
            Ok(Step::Rows(tokens / settings.tokens_per_row))
        }
        _ => Err(Error::Plan("a step takes examples_per_step or tokens_per_step, one of them".to_owned())),
    }
}

/// Datapoints by the context that they share.
struct Groups {
    /// For each datapoint its group, from 0.
    of: Vec<u32>,
    /// Datapoints group by group.
    members: Vec<i32>,
    /// Where each group begins in `members`, and the end of the last.
    offsets: Vec<usize>,
}

impl Groups {
    fn of(groups: &[i64]) -> Self {
        let mut members: Vec<i32> = (0..groups.len() as i32).collect();
        // Data sets number contexts as they come, and a stable sort is fast on what is nearly sorted.
        members.sort_by_key(|&at| groups[at as usize]);
        let mut of = vec![0; groups.len()];
        let mut offsets = vec![0];
        for group in members.chunk_by(|&a, &b| groups[a as usize] == groups[b as usize]) {
            for &at in group {
                of[at as usize] = (offsets.len() - 1) as u32;
            }
            offsets.push(offsets[offsets.len() - 1] + group.len());
        }
        Self { of, members, offsets }
    }

    fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The datapoints of each group, groups and members in random order.
    fn shuffled(&self, draws: &mut Draws) -> Shuffled {
        let mut members = self.members.clone();
        for ends in self.offsets.windows(2) {
            draws.shuffle(&mut members[ends[0]..ends[1]]);
        }
        let mut turn: Vec<u32> = (0..self.len() as u32).collect();
        draws.shuffle(&mut turn);
        let ends = |group: u32| (self.offsets[group as usize], self.offsets[group as usize + 1]);
        let groups = turn.into_iter().map(ends).collect();
        Shuffled { members, groups }
    }
}

/// Groups in random order, as ranges of their members.
struct Shuffled {
    members: Vec<i32>,
    groups: Vec<(usize, usize)>,
}

impl Shuffled {
    /// All datapoints, group by group.
    fn datapoints(&self) -> impl Iterator<Item = i32> {
        self.groups.iter().flat_map(|&(start, end)| self.members[start..end].iter().copied())
    }
}

/// Deal datapoints out to some piles in turn, the piles in random order, so that the members of a group, which stand
/// together, go to different ones.
fn deal(datapoints: &[i32], piles: usize, draws: &mut Draws) -> Vec<Vec<i32>> {
    let mut turn: Vec<usize> = (0..piles).collect();
    draws.shuffle(&mut turn);
    let mut dealt = vec![Vec::with_capacity(datapoints.len().div_ceil(piles.max(1))); piles];
    for (at, &datapoint) in datapoints.iter().enumerate() {
        dealt[turn[at % piles]].push(datapoint);
    }
    dealt
}
