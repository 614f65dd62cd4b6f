//! How many context tokens a plan has to run.

use super::{Groups, Plan};

/// Context tokens of a plan's datapoints, and how few of them are run if a context serves all that share it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Sum over the datapoints: what is run if nothing is shared.
    pub alone: u64,
    /// What is run if a context serves a rank for one window.
    pub in_ranks: u64,
    /// What is run if a context serves all ranks for one window.
    pub in_windows: u64,
    /// What is run if a context serves the whole plan.
    pub at_all: u64,
}

/// Of the datapoints that share, the one with the longest context is run.
pub(super) fn measure(plan: &Plan, context_lengths: &[i32], groups: &Groups, window: usize) -> Sharing {
    let ranks = plan.row_ranks.iter().max().map_or(0, |&most| most + 1);
    // Context tokens run if a context serves until `when` changes, over the rows that have a `when`.
    let run = |when: &dyn Fn(u32, i32) -> Option<u32>| {
        let mut served = vec![(u32::MAX, 0); groups.len()];
        let mut tokens = 0;
        for (step, rows) in plan.step_offsets.windows(2).enumerate() {
            for row in rows[0] as usize..rows[1] as usize {
                let Some(now) = when((step / window) as u32, plan.row_ranks[row]) else { continue };
                for &at in plan.row(row) {
                    let (last, longest) = &mut served[groups.of[at as usize] as usize];
                    if *last != now {
                        (*last, *longest) = (now, 0);
                    }
                    let more = context_lengths[at as usize].saturating_sub(*longest).max(0);
                    *longest += more;
                    tokens += more as u64;
                }
            }
        }
        tokens
    };
    Sharing {
        alone: plan.order.iter().map(|&at| context_lengths[at as usize] as u64).sum(),
        // One rank after the other, or the memory would grow with their number.
        in_ranks: (0..ranks).map(|own| run(&|window, rank| (rank == own).then_some(window))).sum(),
        in_windows: run(&|window, _| Some(window)),
        at_all: run(&|_, _| Some(0)),
    }
}
