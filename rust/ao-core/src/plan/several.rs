//! Rows under several limits: tokens, context tokens, examples.
//!
//! A row is filled from the examples that wait longest. While it has room for several more they are taken as they come,
//! except that one limit must not be used up long before the tightest one; the last places go to the best pair.

use super::rows::{Reach, RowLimits, Rows};

/// How many waiting examples are looked at for each place in a row.
const CANDIDATES: usize = 64;
/// The last places are filled by pairs once fewer average examples than this fit.
const LAST: f64 = 3.0;
/// How many average examples one limit may fall short of the tightest.
const SHORT: f64 = 0.5;

/// Tokens, context tokens, examples: what one costs, or what a row has left.
type Cost = [i64; 3];

pub(super) fn pack(lengths: &[i32], contexts: Option<&[i32]>, limits: RowLimits, reach: Reach) -> Rows {
    let cost = |at: usize| [i64::from(lengths[at]), contexts.map_or(0, |contexts| i64::from(contexts[at])), 1];
    let candidates = match reach {
        Reach::All => CANDIDATES,
        Reach::Next(count) => count.min(CANDIDATES),
    };
    let budgets = budgets(limits);
    let mut filler = Filler { waiting: Vec::with_capacity(candidates), share: Share::of(lengths, contexts, budgets) };
    let mut rows = Rows::new();
    let mut next = 0;
    while rows.order.len() < lengths.len() {
        let mut room = budgets;
        loop {
            while next < lengths.len() && filler.waiting.len() < candidates {
                filler.waiting.push((cost(next), next as i32));
                next += 1;
            }
            let starts = room == budgets;
            let chosen = if starts { [Some(0), None] } else { filler.choose(room) };
            // From the back, so that the first index still holds when the second is gone.
            for chosen in chosen.into_iter().rev().flatten() {
                let (cost, at) = filler.waiting.remove(chosen);
                for (room, cost) in room.iter_mut().zip(cost) {
                    *room -= cost;
                }
                rows.order.push(at);
            }
            if chosen[0].is_none() || filler.waiting.is_empty() && next == lengths.len() {
                break;
            }
        }
        rows.end_row();
    }
    rows
}

fn budgets(limits: RowLimits) -> Cost {
    let or_none = |limit: Option<usize>| limit.map_or(i64::MAX / 2, |limit| limit.min(i64::MAX as usize / 2) as i64);
    [limits.tokens as i64, or_none(limits.context_tokens), or_none(limits.examples)]
}

/// What the examples need on average, and which limit is the tightest.
struct Share {
    mean: [f64; 3],
    tightest: usize,
}

impl Share {
    fn of(lengths: &[i32], contexts: Option<&[i32]>, budgets: Cost) -> Self {
        let mean = |lengths: &[i32]| {
            let sum: i64 = lengths.iter().map(|&length| i64::from(length)).sum();
            (sum as f64 / lengths.len() as f64).max(1e-9)
        };
        let mean = [mean(lengths), contexts.map_or(1e-9, mean), 1.0];
        let used = |limit: usize| mean[limit] / budgets[limit] as f64;
        let tightest = (1..3).fold(0, |most, limit| if used(limit) > used(most) { limit } else { most });
        Self { mean, tightest }
    }

    /// How many average examples a room is good for.
    fn examples(&self, room: &Cost, limit: usize) -> f64 {
        room[limit] as f64 / self.mean[limit]
    }

    /// How many average examples a room falls short in another limit than the tightest.
    fn short(&self, room: &Cost) -> f64 {
        let least = (0..3).map(|limit| self.examples(room, limit)).fold(f64::INFINITY, f64::min);
        self.examples(room, self.tightest) - least
    }
}

struct Filler {
    waiting: Vec<(Cost, i32)>,
    share: Share,
}

impl Filler {
    /// One or two of the waiting for a room, in rising order; none if none fits.
    fn choose(&self, room: Cost) -> [Option<usize>; 2] {
        if self.share.examples(&room, self.share.tightest) < LAST { self.last(room) } else { [self.next(room), None] }
    }

    /// The first that fits and leaves the room balanced, or the one that leaves it nearest to that.
    fn next(&self, room: Cost) -> Option<usize> {
        let mut best = None;
        for (at, (cost, _)) in self.waiting.iter().enumerate() {
            let Some(left) = left(room, *cost) else { continue };
            let short = self.share.short(&left);
            if short <= SHORT {
                return Some(at);
            }
            if best.is_none_or(|(least, _)| short < least) {
                best = Some((short, at));
            }
        }
        best.map(|(_, at)| at)
    }

    /// The pair, or the one, that uses most of the tightest limit.
    fn last(&self, room: Cost) -> [Option<usize>; 2] {
        // Every example counts alike, so where their number is the tightest limit, tokens decide.
        let limit = if self.share.tightest == 2 { 0 } else { self.share.tightest };
        let mut best = (-1, [None, None]);
        for (at, (cost, _)) in self.waiting.iter().enumerate() {
            let Some(left_one) = left(room, *cost) else { continue };
            if cost[limit] > best.0 {
                best = (cost[limit], [Some(at), None]);
            }
            for (beside, (other, _)) in self.waiting[at + 1..].iter().enumerate() {
                let both = cost[limit] + other[limit];
                if both >= best.0 && left(left_one, *other).is_some() && (both > best.0 || best.1[1].is_none()) {
                    best = (both, [Some(at), Some(at + 1 + beside)]);
                }
            }
            if best.0 == room[limit] {
                break;
            }
        }
        best.1
    }
}

/// What a room has left after a cost, if it has that much.
fn left(room: Cost, cost: Cost) -> Option<Cost> {
    let left = [room[0] - cost[0], room[1] - cost[1], room[2] - cost[2]];
    left.iter().all(|&left| left >= 0).then_some(left)
}
