//! Which datapoints make each training step, and which rank takes them.
//!
//! Groups of datapoints that share a context are shuffled, not datapoints. A group falls into one window of steps and
//! is spread over it, so that a context is run once per window and still a step sees many contexts. The order knows
//! nothing of ranks; they only divide each step.

mod exact;
mod rows;
mod several;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::error::{Error, Result};
use crate::sample::Draws;

pub use rows::{Layout, Longer, Reach, RowLimits, Rows, pack_rows};

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct PlanSettings {
    /// Datapoints of one optimizer step, over all ranks.
    pub examples_per_step: usize,
    /// Steps of one window.
    pub window: usize,
    /// Ranks that divide each step.
    pub ranks: usize,
    /// Keys the shuffle.
    pub seed: u64,
    /// Keys the shuffle too.
    pub epoch: u64,
}

/// An order of datapoints, step after step, and the rank of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Indices of datapoints, `examples_per_step` for each step.
    pub order: Vec<i32>,
    /// For each entry of `order`, the rank.
    pub rank: Vec<i32>,
}

/// Plan one epoch. `lengths` are the tokens of each datapoint's input, `context_lengths` those of its context, `groups`
/// say which datapoints share a context. What does not fill a last step is left out.
///
/// # Errors
/// If the lists differ in length, or there are fewer datapoints in a step than ranks.
pub fn plan(lengths: &[i32], context_lengths: &[i32], groups: &[i64], settings: PlanSettings) -> Result<Plan> {
    check(lengths, context_lengths, groups, settings)?;
    let mut draws = Draws::new(settings.seed, &settings.epoch.to_string(), "plan");
    let members = shuffled_groups(groups, &mut draws);
    let windows = fill_windows(&members, lengths.len(), settings);
    let mut order = Vec::with_capacity(lengths.len());
    for window in windows {
        order.extend(spread(&window, settings.examples_per_step, &mut draws));
    }
    let mut rank = Vec::with_capacity(order.len());
    let capacity = settings.window.saturating_mul(settings.examples_per_step);
    for window in order.chunks(capacity) {
        let mut homes = HashMap::new();
        for step in window.chunks(settings.examples_per_step) {
            rank.extend(divide(step, lengths, context_lengths, groups, settings.ranks, &mut homes));
        }
    }
    Ok(Plan { order: order.into_iter().map(|at| at as i32).collect(), rank })
}

fn check(lengths: &[i32], context_lengths: &[i32], groups: &[i64], settings: PlanSettings) -> Result<()> {
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
    if settings.window == 0 || settings.ranks == 0 || settings.examples_per_step < settings.ranks {
        return Err(Error::Plan(format!(
            "window and ranks must be at least 1 and examples_per_step at least ranks, got window {}, ranks {}, \
             examples_per_step {}",
            settings.window, settings.ranks, settings.examples_per_step
        )));
    }
    if let Some(at) = lengths.iter().chain(context_lengths).position(|&length| length < 0) {
        return Err(Error::Plan(format!("a length is negative, at index {}", at % count)));
    }
    Ok(())
}

/// The datapoints of each group, groups and members in random order.
fn shuffled_groups(groups: &[i64], draws: &mut Draws) -> Vec<Vec<usize>> {
    let mut by_group: Vec<usize> = (0..groups.len()).collect();
    by_group.sort_by_key(|&at| (groups[at], at));
    let mut members: Vec<Vec<usize>> =
        by_group.chunk_by(|&a, &b| groups[a] == groups[b]).map(<[usize]>::to_vec).collect();
    for group in &mut members {
        draws.shuffle(group);
    }
    draws.shuffle(&mut members);
    members
}

/// Groups that wait for a window, in shuffled order, found by size.
struct Waiting {
    groups: Vec<Option<Vec<usize>>>,
    by_size: BTreeMap<usize, VecDeque<usize>>,
    next: usize,
}

impl Waiting {
    fn new(groups: Vec<Vec<usize>>) -> Self {
        let mut by_size: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
        for (at, group) in groups.iter().enumerate() {
            by_size.entry(group.len()).or_default().push_back(at);
        }
        Self { groups: groups.into_iter().map(Some).collect(), by_size, next: 0 }
    }

    /// The next group of the order if it has at most `room` members, else the earliest one that has.
    fn take(&mut self, room: usize) -> Option<Vec<usize>> {
        while self.groups.get(self.next).is_some_and(Option::is_none) {
            self.next += 1;
        }
        let fits = self.groups.get(self.next)?.as_ref().is_some_and(|group| group.len() <= room);
        let at = if fits { self.next } else { self.earliest(room)? };
        let group = self.groups[at].take()?;
        let queue = self.by_size.get_mut(&group.len())?;
        if let Ok(place) = queue.binary_search(&at) {
            queue.remove(place);
        }
        if queue.is_empty() {
            self.by_size.remove(&group.len());
        }
        Some(group)
    }

    fn earliest(&self, room: usize) -> Option<usize> {
        self.by_size.range(..=room).filter_map(|(_, queue)| queue.front().copied()).min()
    }

    /// Take the first `count` members of the next group and leave the rest waiting in its place.
    fn split(&mut self, count: usize) -> Option<Vec<usize>> {
        let mut group = self.take(usize::MAX)?;
        let at = self.next;
        let rest = group.split_off(count.min(group.len()));
        if !rest.is_empty() {
            let queue = self.by_size.entry(rest.len()).or_default();
            let place = queue.binary_search(&at).unwrap_or_else(|place| place);
            queue.insert(place, at);
            self.groups[at] = Some(rest);
        }
        Some(group)
    }
}

/// Cut the groups into windows of `window * examples_per_step` datapoints, the last one shorter and a whole number of
/// steps. A group is divided only if it is larger than a window, or where no waiting group fits what is left of one.
fn fill_windows(groups: &[Vec<usize>], count: usize, settings: PlanSettings) -> Vec<Vec<usize>> {
    let step = settings.examples_per_step;
    let largest = settings.window.saturating_mul(step);
    let mut left = count / step * step;
    let fitting = groups.iter().flat_map(|group| group.chunks(largest).map(<[usize]>::to_vec));
    let mut waiting = Waiting::new(fitting.collect());
    let mut windows = Vec::new();
    while left > 0 {
        let capacity = left.min(largest);
        let mut window = Vec::with_capacity(capacity);
        while window.len() < capacity {
            let room = capacity - window.len();
            let Some(group) = waiting.take(room).or_else(|| waiting.split(room)) else { break };
            window.extend(group);
        }
        left -= window.len();
        windows.push(window);
    }
    windows
}

/// Deal a window out to its steps in turn: the members of a group, which stand together, go to different steps.
fn spread(window: &[usize], examples_per_step: usize, draws: &mut Draws) -> Vec<usize> {
    let num_steps = window.len() / examples_per_step;
    let mut turn: Vec<usize> = (0..num_steps).collect();
    draws.shuffle(&mut turn);
    let mut steps = vec![Vec::with_capacity(examples_per_step); num_steps];
    for (at, &datapoint) in window.iter().enumerate() {
        steps[turn[at % num_steps]].push(datapoint);
    }
    for step in &mut steps {
        draws.shuffle(step);
    }
    steps.concat()
}

/// Divide a step among ranks. A datapoint stays on the rank that already ran its context in this window while that rank
/// has no more than its fair share of tokens; the others go, the longest first, each to the lightest rank.
fn divide(
    step: &[usize],
    lengths: &[i32],
    context_lengths: &[i32],
    groups: &[i64],
    ranks: usize,
    homes: &mut HashMap<i64, usize>,
) -> Vec<i32> {
    let tokens = |at: usize| i64::from(lengths[step[at]]);
    let fair = (0..step.len()).map(tokens).sum::<i64>() / ranks as i64;
    let mut load = vec![0; ranks];
    let mut count = vec![0; ranks];
    let mut rank = vec![None; step.len()];
    let mut by_length: Vec<usize> = (0..step.len()).collect();
    by_length.sort_by_key(|&at| (Reverse((tokens(at), context_lengths[step[at]])), at));
    // Every rank must get something, or it would have no gradient to give: enough is left for those without.
    let mut to_spare = step.len() - ranks;
    for &at in &by_length {
        let home = homes.get(&groups[step[at]]).copied();
        let Some(home) = home.filter(|&home| load[home] + tokens(at) <= fair) else { continue };
        if count[home] > 0 {
            if to_spare == 0 {
                continue;
            }
            to_spare -= 1;
        }
        load[home] += tokens(at);
        count[home] += 1;
        rank[at] = Some(home);
    }
    for &at in &by_length {
        if rank[at].is_none() {
            let lightest = (0..ranks).min_by_key(|&rank| (count[rank] > 0, load[rank])).unwrap_or(0);
            homes.entry(groups[step[at]]).or_insert(lightest);
            load[lightest] += tokens(at);
            count[lightest] += 1;
            rank[at] = Some(lightest);
        }
    }
    rank.into_iter().map(|rank| rank.unwrap_or(0) as i32).collect()
}
