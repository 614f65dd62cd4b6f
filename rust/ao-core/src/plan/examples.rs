//! Steps of a number of datapoints. Whole groups fill a window; each step is then divided among the ranks, and what a
//! rank gets is laid out in rows.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use super::rows::{self, Reach};
use super::{Datapoints, Groups, Plan, PlanSettings, Shuffled, deal};
use crate::sample::Draws;

pub(super) fn plan(
    plan: &mut Plan,
    datapoints: Datapoints,
    settings: &PlanSettings,
    per_step: usize,
    groups: &Groups,
    shuffled: Shuffled,
    draws: &mut Draws,
) {
    let mut divider = Divider::new(datapoints, settings, groups);
    for window in fill_windows(shuffled, datapoints.lengths.len(), per_step, settings.window) {
        divider.next_window();
        for mut step in deal(&window, window.len() / per_step, draws) {
            draws.shuffle(&mut step);
            for (rank, mine) in divider.divide(&step).into_iter().enumerate() {
                divider.lay_out(&mine, rank, plan);
            }
            plan.end_step();
        }
    }
}

/// Cut the groups into windows of `steps * per_step` datapoints, the last one shorter and a whole number of steps. A
/// group is divided only if it is larger than a window, or where no waiting group fits what is left of one.
fn fill_windows(shuffled: Shuffled, count: usize, per_step: usize, steps: usize) -> impl Iterator<Item = Vec<i32>> {
    let largest = steps.saturating_mul(per_step);
    let mut left = count / per_step * per_step;
    let Shuffled { members, groups } = shuffled;
    let parts = |(start, end): (usize, usize)| (start..end).step_by(largest).map(move |at| (at, end.min(at + largest)));
    let mut waiting = Waiting::new(groups.into_iter().flat_map(parts).collect());
    std::iter::from_fn(move || {
        let capacity = left.min(largest);
        let mut window = Vec::with_capacity(capacity);
        while window.len() < capacity {
            let room = capacity - window.len();
            let Some((start, end)) = waiting.take(room).or_else(|| waiting.split(room)) else { break };
            window.extend_from_slice(&members[start..end]);
        }
        left -= window.len();
        (!window.is_empty()).then_some(window)
    })
}

/// Groups that wait for a window, in shuffled order, found by size.
struct Waiting {
    groups: Vec<Option<(usize, usize)>>,
    by_size: BTreeMap<usize, VecDeque<usize>>,
    next: usize,
}

impl Waiting {
    fn new(groups: Vec<(usize, usize)>) -> Self {
        let mut by_size: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
        for (at, (start, end)) in groups.iter().enumerate() {
            by_size.entry(end - start).or_default().push_back(at);
        }
        Self { groups: groups.into_iter().map(Some).collect(), by_size, next: 0 }
    }

    /// The next group of the order if it has at most `room` members, else the earliest one that has.
    fn take(&mut self, room: usize) -> Option<(usize, usize)> {
        while self.groups.get(self.next).is_some_and(Option::is_none) {
            self.next += 1;
        }
        let fits = self.groups.get(self.next)?.is_some_and(|(start, end)| end - start <= room);
        let at = if fits { self.next } else { self.earliest(room)? };
        let (start, end) = self.groups[at].take()?;
        let queue = self.by_size.get_mut(&(end - start))?;
        if let Ok(place) = queue.binary_search(&at) {
            queue.remove(place);
        }
        if queue.is_empty() {
            self.by_size.remove(&(end - start));
        }
        Some((start, end))
    }

    fn earliest(&self, room: usize) -> Option<usize> {
        self.by_size.range(..=room).filter_map(|(_, queue)| queue.front().copied()).min()
    }

    /// Take the first `count` members of the next group and leave the rest waiting in its place.
    fn split(&mut self, count: usize) -> Option<(usize, usize)> {
        let (start, end) = self.take(usize::MAX)?;
        let at = self.next;
        let cut = end.min(start + count);
        if cut < end {
            let queue = self.by_size.entry(end - cut).or_default();
            let place = queue.binary_search(&at).unwrap_or_else(|place| place);
            queue.insert(place, at);
            self.groups[at] = Some((cut, end));
        }
        Some((start, cut))
    }
}

/// Divides steps among ranks and remembers, within a window, which rank runs which context.
struct Divider<'a> {
    datapoints: Datapoints<'a>,
    settings: &'a PlanSettings,
    groups: &'a Groups,
    /// By group: the window in which it was last run, counted from 1, and the rank.
    homes: Vec<(u32, u32)>,
    window: u32,
}

impl<'a> Divider<'a> {
    fn new(datapoints: Datapoints<'a>, settings: &'a PlanSettings, groups: &'a Groups) -> Self {
        Self { datapoints, settings, groups, homes: vec![(0, 0); groups.len()], window: 0 }
    }

    fn next_window(&mut self) {
        self.window += 1;
    }

    /// The datapoints of each rank. One stays on the rank that already ran its context in this window while that rank
    /// has no more than its fair share of tokens; the others go, the longest first, each to the lightest rank.
    fn divide(&mut self, step: &[i32]) -> Vec<Vec<i32>> {
        let ranks = self.settings.ranks;
        if ranks == 1 {
            return vec![step.to_vec()];
        }
        let (lengths, context_lengths) = (self.datapoints.lengths, self.datapoints.context_lengths);
        let tokens = |at: usize| i64::from(lengths[step[at] as usize]);
        let fair = (0..step.len()).map(tokens).sum::<i64>() / ranks as i64;
        let mut load = vec![0; ranks];
        let mut count = vec![0; ranks];
        let mut rank = vec![None; step.len()];
        let mut by_length: Vec<usize> = (0..step.len()).collect();
        by_length.sort_by_key(|&at| (Reverse((tokens(at), context_lengths[step[at] as usize])), at));
        // Every rank must get something, or it would have no gradient to give: enough is left for those without.
        let mut to_spare = step.len() - ranks;
        for &at in &by_length {
            let (window, home) = self.homes[self.groups.of[step[at] as usize] as usize];
            let home = home as usize;
            if window != self.window || load[home] + tokens(at) > fair {
                continue;
            }
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
                let home = &mut self.homes[self.groups.of[step[at] as usize] as usize];
                if home.0 != self.window {
                    *home = (self.window, lightest as u32);
                }
                load[lightest] += tokens(at);
                count[lightest] += 1;
                rank[at] = Some(lightest);
            }
        }
        let mut divided = vec![Vec::new(); ranks];
        for (&datapoint, rank) in step.iter().zip(rank) {
            divided[rank.unwrap_or(0)].push(datapoint);
        }
        divided
    }

    fn lay_out(&self, mine: &[i32], rank: usize, plan: &mut Plan) {
        let of = |lengths: &[i32]| mine.iter().map(|&at| lengths[at as usize]).collect::<Vec<_>>();
        let lengths = of(self.datapoints.lengths);
        let contexts = of(self.datapoints.context_lengths);
        let rows = rows::pack(&lengths, &contexts, self.settings.limits(), Reach::All);
        for row in rows.iter() {
            plan.push_row(row.iter().map(|&at| mine[at as usize]), rank);
        }
    }
}
