//! Plans: every datapoint at most once, groups in their window, ranks even, order independent of ranks.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::collections::{HashMap, HashSet};

use ao_core::plan::{Plan, PlanSettings, plan};
use proptest::prelude::*;

fn settings(examples_per_step: usize, window: usize, ranks: usize) -> PlanSettings {
    PlanSettings { examples_per_step, window, ranks, seed: 3, epoch: 1 }
}

fn make(groups: &[i64], settings: PlanSettings) -> Plan {
    let lengths: Vec<i32> = (0..groups.len()).map(|at| 20 + (at * 7919 % 113) as i32).collect();
    plan(&lengths, &lengths, groups, settings).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn invariants(
        sizes in prop::collection::vec(1usize..9, 1..80), step in 1usize..9, window in 1usize..7, ranks in 1usize..5,
    ) {
        let ranks = ranks.min(step);
        let groups: Vec<i64> = sizes.iter().enumerate().flat_map(|(at, &size)| vec![at as i64 * 11; size]).collect();
        let made = make(&groups, settings(step, window, ranks));
        let steps = groups.len() / step;
        prop_assert_eq!(made.order.len(), steps * step);
        prop_assert_eq!(made.rank.len(), made.order.len());
        prop_assert_eq!(made.order.iter().collect::<HashSet<_>>().len(), made.order.len());
        prop_assert_eq!(&made.order, &make(&groups, settings(step, window, 1)).order);
        for step in made.rank.chunks(step) {
            let used: HashSet<i32> = step.iter().copied().collect();
            prop_assert_eq!(used.len(), ranks, "a rank has nothing to do in {:?}", step);
        }
        check_windows(&made, &groups, step, window)?;
    }
}

/// A group lies in one window unless it had to be divided: because it is larger than a window, or to fill one up.
fn check_windows(made: &Plan, groups: &[i64], step: usize, window: usize) -> Result<(), TestCaseError> {
    let capacity = step * window;
    let mut windows_of: HashMap<i64, HashSet<usize>> = HashMap::new();
    for (at, &datapoint) in made.order.iter().enumerate() {
        windows_of.entry(groups[datapoint as usize]).or_default().insert(at / capacity);
    }
    let num_windows = made.order.len().div_ceil(capacity);
    let mut cuts = 0;
    for (group, windows) in &windows_of {
        let size = groups.iter().filter(|&other| other == group).count();
        prop_assert!(windows.len() <= size.div_ceil(capacity) + 1);
        cuts += windows.len().saturating_sub(size.div_ceil(capacity));
    }
    prop_assert!(cuts < num_windows.max(1), "{} cuts for {} windows", cuts, num_windows);
    Ok(())
}

#[test]
fn groups_that_fit_are_never_divided_and_are_spread() {
    let groups: Vec<i64> = (0..4096).map(|at| at / 4).collect();
    let made = make(&groups, settings(16, 64, 4));
    let mut places: HashMap<i64, Vec<usize>> = HashMap::new();
    for (at, &datapoint) in made.order.iter().enumerate() {
        places.entry(groups[datapoint as usize]).or_default().push(at / 16);
    }
    for steps in places.values() {
        assert_eq!(steps.iter().map(|step| step / 64).collect::<HashSet<_>>().len(), 1);
        assert_eq!(steps.iter().collect::<HashSet<_>>().len(), 4, "a group meets itself in a step: {steps:?}");
    }
}

#[test]
fn ranks_are_even_and_contexts_stay() {
    let groups: Vec<i64> = (0..8192).map(|at| at / 6).collect();
    let lengths: Vec<i32> = (0..8192).map(|at| 30 + (at * 7919 % 300)).collect();
    let made = plan(&lengths, &lengths, &groups, settings(64, 64, 4)).unwrap();
    let mut homes: HashMap<(usize, i64), HashSet<i32>> = HashMap::new();
    for (number, (order, rank)) in made.order.chunks(64).zip(made.rank.chunks(64)).enumerate() {
        let mut load = [0i64; 4];
        for (&datapoint, &rank) in order.iter().zip(rank) {
            load[rank as usize] += i64::from(lengths[datapoint as usize]);
            homes.entry((number / 64, groups[datapoint as usize])).or_default().insert(rank);
        }
        let mean = load.iter().sum::<i64>() as f64 / 4.0;
        let most = load.into_iter().max().unwrap() as f64;
        assert!(most < 1.1 * mean, "step {number}: {load:?}");
    }
    let runs: usize = homes.values().map(HashSet::len).sum();
    assert!((runs as f64) < 1.7 * homes.len() as f64, "{runs} runs of {} contexts", homes.len());
}

#[test]
fn seeds_and_epochs_differ_and_repeat() {
    let groups: Vec<i64> = (0..200).collect();
    let base = settings(8, 4, 2);
    assert_eq!(make(&groups, base), make(&groups, base));
    assert_ne!(make(&groups, base).order, make(&groups, PlanSettings { epoch: 2, ..base }).order);
    assert_ne!(make(&groups, base).order, make(&groups, PlanSettings { seed: 4, ..base }).order);
}

#[test]
fn a_tail_is_left_out_and_nothing_is_no_error() {
    assert_eq!(make(&[1, 2, 3, 4, 5, 6, 7], settings(3, 2, 1)).order.len(), 6);
    assert!(make(&[1, 2], settings(3, 2, 1)).order.is_empty());
    assert!(make(&[], settings(3, 2, 1)).order.is_empty());
}

#[test]
fn a_group_larger_than_a_window_is_divided() {
    let made = make(&[5; 40], settings(4, 2, 2));
    assert_eq!(made.order.iter().collect::<HashSet<_>>().len(), 40);
}

#[test]
fn wrong_arguments_are_refused() {
    let refuse =
        |lengths: &[i32], groups: &[i64], settings| plan(lengths, lengths, groups, settings).unwrap_err().to_string();
    assert!(refuse(&[1, 2], &[1], settings(1, 1, 1)).contains("equally long, got 2, 2 and 1"));
    assert!(refuse(&[1, -2], &[1, 1], settings(1, 1, 1)).contains("negative, at index 1"));
    assert!(refuse(&[1], &[1], settings(1, 1, 2)).contains("at least ranks"));
    assert!(refuse(&[1], &[1], settings(1, 0, 1)).contains("window"));
}
