//! Steps of a number of rows, each of a token budget.
//!
//! The rows of one number in every step make a lane, and a group of datapoints is laid out within one lane of one
//! window: whichever ranks the lanes are dealt to, a context is run by one of them. What the rows of a window cannot
//! take goes first in the next lane, so hardly any row is less than full.

use super::rows::{self, Layout, Reach};
use super::{Datapoints, Plan, PlanSettings, Shuffled, deal};
use crate::sample::Draws;

pub(super) fn plan(
    plan: &mut Plan,
    datapoints: Datapoints,
    settings: &PlanSettings,
    rows_per_step: usize,
    shuffled: &Shuffled,
    draws: &mut Draws,
) {
    let mut queue = Queue::new(datapoints, settings, shuffled.datapoints().collect());
    loop {
        let most = (queue.rows_left() / rows_per_step).min(settings.window);
        if most == 0 {
            break;
        }
        let mut lanes: Vec<Vec<Vec<i32>>> = (0..rows_per_step).map(|_| queue.lane(most, draws)).collect();
        // Only where the datapoints come to their end can a lane be shorter than was asked for.
        let steps = lanes.iter().map(Vec::len).min().unwrap_or(0);
        for lane in &mut lanes {
            queue.put_back(lane.drain(steps..));
        }
        if steps == 0 {
            break;
        }
        for step in 0..steps {
            for (at, lane) in lanes.iter().enumerate() {
                plan.push_row(lane[step].iter().copied(), at * settings.ranks / rows_per_step);
            }
            plan.end_step();
        }
    }
}

/// Datapoints that have no row yet.
struct Queue<'a> {
    datapoints: Datapoints<'a>,
    settings: &'a PlanSettings,
    /// Those that were looked at and found no place; they go first.
    carried: Vec<i32>,
    /// All, group by group.
    shuffled: Vec<i32>,
    /// The first of `shuffled` that was not looked at.
    next: usize,
    /// What those without a row need.
    left: Need,
    /// Rows that the last lane took for each that its needs would fill.
    waste: f64,
}

/// Tokens, context tokens and examples.
#[derive(Clone, Copy, Default)]
struct Need([usize; 3]);

impl Need {
    fn add(&mut self, datapoints: Datapoints, at: i32) {
        self.0[0] += datapoints.lengths[at as usize] as usize;
        self.0[1] += datapoints.context_lengths[at as usize] as usize;
        self.0[2] += 1;
    }

    /// How many rows this would fill.
    fn rows(&self, settings: &PlanSettings) -> f64 {
        let limits = [Some(settings.tokens_per_row), settings.context_tokens_per_row, settings.examples_per_row];
        let rows = self.0.iter().zip(limits).filter_map(|(&need, limit)| Some(need as f64 / limit? as f64));
        rows.fold(0.0, f64::max)
    }
}

impl<'a> Queue<'a> {
    fn new(datapoints: Datapoints<'a>, settings: &'a PlanSettings, shuffled: Vec<i32>) -> Self {
        let mut left = Need::default();
        for &at in &shuffled {
            left.add(datapoints, at);
        }
        Self { datapoints, settings, carried: Vec::new(), shuffled, next: 0, left, waste: 1.0 }
    }

    fn rows_left(&self) -> usize {
        (self.left.rows(self.settings) * self.waste) as usize
    }

    /// Up to `count` rows, full where there are datapoints enough.
    fn lane(&mut self, count: usize, draws: &mut Draws) -> Vec<Vec<i32>> {
        let mut pool = std::mem::take(&mut self.carried);
        let mut need = self.need(std::slice::from_ref(&pool));
        let first = self.next;
        // One row more than is asked for, so that the last of them still finds what fits.
        let wanted = (count + 1) as f64;
        while self.next < self.shuffled.len() && need.rows(self.settings) * self.waste < wanted {
            need.add(self.datapoints, self.shuffled[self.next]);
            self.next += 1;
        }
        pool.extend(deal(&self.shuffled[first..self.next], count, draws).into_iter().flatten());
        let mut rows = self.lay_out(&pool);
        // The last row holds what is left.
        if let [full @ .., _] = &rows[..]
            && !full.is_empty()
        {
            self.waste = (full.len() as f64 / self.need(full).rows(self.settings)).max(1.0);
        }
        if self.settings.padded {
            // By length they stand in order, and always the shortest would have to wait.
            draws.shuffle(&mut rows);
        }
        let rest = rows.split_off(count.min(rows.len()));
        draws.shuffle(&mut rows);
        let need = self.need(&rows);
        for (left, need) in self.left.0.iter_mut().zip(need.0) {
            *left -= need;
        }
        self.carried.extend(rest.into_iter().flatten());
        rows
    }

    fn need(&self, rows: &[Vec<i32>]) -> Need {
        let mut need = Need::default();
        for &at in rows.iter().flatten() {
            need.add(self.datapoints, at);
        }
        need
    }

    fn put_back(&mut self, rows: impl Iterator<Item = Vec<i32>>) {
        for at in rows.flatten() {
            self.left.add(self.datapoints, at);
            self.carried.push(at);
        }
    }

    fn lay_out(&self, pool: &[i32]) -> Vec<Vec<i32>> {
        let of = |lengths: &[i32]| pool.iter().map(|&at| lengths[at as usize]).collect::<Vec<_>>();
        let (lengths, contexts) = (of(self.datapoints.lengths), of(self.datapoints.context_lengths));
        // In turn, so that what was carried is placed first.
        let reach = match self.settings.limits().layout {
            Layout::Packed => Reach::Next(pool.len().max(1)),
            Layout::Padded => Reach::All,
        };
        let rows = rows::pack(&lengths, &contexts, self.settings.limits(), reach);
        rows.iter().map(|row| row.iter().map(|&at| pool[at as usize]).collect()).collect()
    }
}
