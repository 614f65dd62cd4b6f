//! Plans: every datapoint at most once, groups in their window, ranks even, order independent of ranks.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cases;

use std::collections::{HashMap, HashSet};

use ao_core::plan::{Datapoints, Layout, Longer, Plan, PlanSettings, Reach, RowLimits, Rows, Sharing, pack_rows, plan};
use ao_core::sample::Draws;
use proptest::prelude::*;

fn settings(examples_per_step: usize, window: usize, ranks: usize) -> PlanSettings {
    PlanSettings {
        examples_per_step: Some(examples_per_step),
        tokens_per_step: None,
        tokens_per_row: 512,
        context_tokens_per_row: None,
        examples_per_row: None,
        padded: false,
        longer_alone: false,
        window,
        ranks,
        seed: 3,
        epoch: 1,
    }
}

/// Steps of so many rows of 512 tokens.
fn by_rows(rows: usize, window: usize, ranks: usize) -> PlanSettings {
    PlanSettings { examples_per_step: None, tokens_per_step: Some(512 * rows), ..settings(1, window, ranks) }
}

fn lengths_of(count: usize) -> Vec<i32> {
    (0..count).map(|at| 20 + (at * 7919 % 113) as i32).collect()
}

fn make(groups: &[i64], settings: &PlanSettings) -> Plan {
    let lengths = lengths_of(groups.len());
    plan(Datapoints { lengths: &lengths, context_lengths: &lengths, groups }, settings).unwrap()
}

/// The datapoints of each step, each with its rank, in the order of their indices.
fn steps_of(plan: &Plan) -> Vec<Vec<(i32, i32)>> {
    let step = |step| {
        let rows = plan.step(step).flat_map(|row| plan.row(row).iter().map(move |&at| (at, plan.row_ranks[row])));
        let mut step: Vec<(i32, i32)> = rows.collect();
        step.sort_unstable();
        step
    };
    (0..plan.num_steps()).map(step).collect()
}

fn without_ranks(plan: &Plan) -> Vec<Vec<i32>> {
    steps_of(plan).into_iter().map(|step| step.into_iter().map(|(at, _)| at).collect()).collect()
}

/// Arrays that agree with each other, every datapoint at most once, rows within the budget, ranks in order and all busy.
fn check_plan(made: &Plan, lengths: &[i32], settings: &PlanSettings) -> Result<(), TestCaseError> {
    prop_assert_eq!(made.order.iter().collect::<HashSet<_>>().len(), made.order.len());
    prop_assert_eq!(made.row_offsets.len(), made.row_ranks.len() + 1);
    prop_assert_eq!(made.row_offsets.last(), Some(&(made.order.len() as i64)));
    prop_assert_eq!(made.step_offsets.last(), Some(&(made.row_ranks.len() as i64)));
    for row in 0..made.row_ranks.len() {
        let tokens: i32 = made.row(row).iter().map(|&at| lengths[at as usize]).sum();
        prop_assert!(!made.row(row).is_empty());
        prop_assert!(tokens as usize <= settings.tokens_per_row, "{} tokens in a row", tokens);
    }
    for step in 0..made.num_steps() {
        let ranks = &made.row_ranks[made.step(step)];
        prop_assert!(ranks.is_sorted());
        let used: HashSet<i32> = ranks.iter().copied().collect();
        prop_assert_eq!(used.len(), settings.ranks, "a rank has nothing to do in {:?}", ranks);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases::cases(128))]

    #[test]
    fn steps_of_examples(
        sizes in prop::collection::vec(1usize..9, 1..80), step in 1usize..9, window in 1usize..7, ranks in 1usize..5,
    ) {
        let ranks = ranks.min(step);
        let groups: Vec<i64> = sizes.iter().enumerate().flat_map(|(at, &size)| vec![at as i64 * 11; size]).collect();
        let settings = settings(step, window, ranks);
        let made = make(&groups, &settings);
        check_plan(&made, &lengths_of(groups.len()), &settings)?;
        prop_assert_eq!(made.num_steps(), groups.len() / step);
        prop_assert!(steps_of(&made).iter().all(|found| found.len() == step));
        prop_assert_eq!(without_ranks(&made), without_ranks(&make(&groups, &PlanSettings { ranks: 1, ..settings })));
        check_windows(&made, &groups, step, window)?;
    }

    #[test]
    fn steps_of_rows(
        sizes in prop::collection::vec(1usize..9, 1..200), per_rank in 1usize..4, window in 1usize..7,
        ranks in 1usize..4, most in prop::option::of(4usize..9), padded in any::<bool>(),
    ) {
        let groups: Vec<i64> = sizes.iter().enumerate().flat_map(|(at, &size)| vec![at as i64 * 11; size]).collect();
        let lengths = lengths_of(groups.len());
        let rows = per_rank * ranks;
        let settings = PlanSettings { examples_per_row: most, padded, ..by_rows(rows, window, ranks) };
        let made = make(&groups, &settings);
        check_plan(&made, &lengths, &settings)?;
        prop_assert!((0..made.num_steps()).all(|step| made.step(step).len() == rows));
        prop_assert!((0..made.row_ranks.len()).all(|row| most.is_none_or(|most| made.row(row).len() <= most)));
        let alone = make(&groups, &PlanSettings { ranks: 1, ..settings });
        prop_assert_eq!((&made.order, &made.row_offsets), (&alone.order, &alone.row_offsets));
        if most.is_none() && !padded {
            // What is left out would not fill another step.
            let left = sum(&lengths) - sum(&made.order.iter().map(|&at| lengths[at as usize]).collect::<Vec<_>>());
            prop_assert!(left < 2 * rows * 512, "{} tokens left out", left);
        }
    }

    #[test]
    fn sharing_is_what_a_count_finds(
        sizes in prop::collection::vec(1usize..9, 1..80), step in 2usize..9, window in 1usize..7, ranks in 1usize..3,
    ) {
        let groups: Vec<i64> = sizes.iter().enumerate().flat_map(|(at, &size)| vec![at as i64; size]).collect();
        let lengths = lengths_of(groups.len());
        let made = make(&groups, &settings(step, window, ranks));
        let mut run: [HashMap<(usize, i32, i64), i32>; 3] = Default::default();
        for (number, step) in steps_of(&made).into_iter().enumerate() {
            for (at, rank) in step {
                let (group, length) = (groups[at as usize], lengths[at as usize]);
                for (run, key) in run.iter_mut().zip([(number / window, rank, group), (number / window, 0, group), (0, 0, group)]) {
                    let longest = run.entry(key).or_default();
                    *longest = length.max(*longest);
                }
            }
        }
        let [in_ranks, in_windows, at_all] = run.map(|run| run.values().map(|&length| length as u64).sum::<u64>());
        let alone = made.order.iter().map(|&at| lengths[at as usize] as u64).sum();
        prop_assert_eq!(made.sharing, Sharing { alone, in_ranks, in_windows, at_all });
    }
}

/// A group lies in one window unless it had to be divided: because it is larger than a window, or to fill one up.
fn check_windows(made: &Plan, groups: &[i64], step: usize, window: usize) -> Result<(), TestCaseError> {
    let capacity = step * window;
    let mut windows_of: HashMap<i64, HashSet<usize>> = HashMap::new();
    for (number, step) in steps_of(made).into_iter().enumerate() {
        for (at, _) in step {
            windows_of.entry(groups[at as usize]).or_default().insert(number / window);
        }
    }
    let num_windows = made.num_steps().div_ceil(window);
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
    let made = make(&groups, &settings(16, 64, 4));
    let mut places: HashMap<i64, Vec<usize>> = HashMap::new();
    for (number, step) in steps_of(&made).into_iter().enumerate() {
        for (at, _) in step {
            places.entry(groups[at as usize]).or_default().push(number);
        }
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
    let datapoints = Datapoints { lengths: &lengths, context_lengths: &lengths, groups: &groups };
    let made = plan(datapoints, &settings(64, 64, 4)).unwrap();
    let mut homes: HashMap<(usize, i64), HashSet<i32>> = HashMap::new();
    for (number, step) in steps_of(&made).into_iter().enumerate() {
        let mut load = [0i64; 4];
        for (at, rank) in step {
            load[rank as usize] += i64::from(lengths[at as usize]);
            homes.entry((number / 64, groups[at as usize])).or_default().insert(rank);
        }
        let mean = load.iter().sum::<i64>() as f64 / 4.0;
        let most = load.into_iter().max().unwrap() as f64;
        assert!(most < 1.1 * mean, "step {number}: {load:?}");
    }
    let runs: usize = homes.values().map(HashSet::len).sum();
    assert!((runs as f64) < 1.7 * homes.len() as f64, "{runs} runs of {} contexts", homes.len());
}

#[test]
fn steps_of_rows_are_full_and_share_contexts_on_every_number_of_ranks() {
    let lengths = example_lengths(60_000);
    let contexts: Vec<i32> = (0..60_000).map(|at| 100 + at / 6 % 97).collect();
    let groups: Vec<i64> = (0..60_000).map(|at| at / 6).collect();
    let datapoints = Datapoints { lengths: &lengths, context_lengths: &contexts, groups: &groups };
    for (ranks, padded, least) in [(1, false, 0.999), (2, false, 0.999), (8, false, 0.999), (8, true, 0.93)] {
        let settings =
            PlanSettings { tokens_per_row: 2048, tokens_per_step: Some(8 * 2048), padded, ..by_rows(1, 64, ranks) };
        let made = plan(datapoints, &settings).unwrap();
        let tokens: i64 = made.order.iter().map(|&at| i64::from(lengths[at as usize])).sum();
        let fill = tokens as f64 / (made.row_ranks.len() * 2048) as f64;
        assert!(fill >= least, "{ranks} ranks, padded {padded}: {fill}");
        assert!(made.order.len() > 59_000, "{} datapoints", made.order.len());
        let Sharing { alone, in_ranks, in_windows, at_all } = made.sharing;
        let factor = |run: u64| alone as f64 / run as f64;
        assert!((factor(at_all) - 6.0).abs() < 0.01, "{}", factor(at_all));
        assert!(factor(in_windows) > 5.5, "{}", factor(in_windows));
        assert!(factor(in_ranks) > if padded { 5.0 } else { 5.3 }, "{ranks}: {}", factor(in_ranks));
    }
}

#[test]
fn seeds_and_epochs_differ_and_repeat() {
    let groups: Vec<i64> = (0..200).collect();
    for base in [settings(8, 4, 2), by_rows(2, 4, 2)] {
        assert_eq!(make(&groups, &base), make(&groups, &base));
        let other = |settings: &PlanSettings| without_ranks(&make(&groups, settings));
        assert_ne!(other(&PlanSettings { epoch: 2, ..base.clone() }), other(&base));
        assert_ne!(other(&PlanSettings { seed: 4, ..base.clone() }), other(&base));
    }
}

#[test]
fn a_tail_is_left_out_and_nothing_is_no_error() {
    assert_eq!(make(&[1, 2, 3, 4, 5, 6, 7], &settings(3, 2, 1)).order.len(), 6);
    for settings in [settings(3, 2, 1), by_rows(1, 2, 1)] {
        assert_eq!(make(&[1, 2], &settings).num_steps(), 0);
        assert_eq!(make(&[], &settings).num_steps(), 0);
    }
}

#[test]
fn a_group_larger_than_a_window_is_divided() {
    assert_eq!(make(&[5; 40], &settings(4, 2, 2)).order.iter().collect::<HashSet<_>>().len(), 40);
    assert_eq!(make(&[5; 40], &by_rows(2, 2, 2)).num_steps(), 2);
}

#[test]
fn wrong_arguments_are_refused() {
    let refuse = |lengths: &[i32], groups: &[i64], settings: &PlanSettings| {
        plan(Datapoints { lengths, context_lengths: lengths, groups }, settings).unwrap_err().to_string()
    };
    let one = settings(1, 1, 1);
    assert!(refuse(&[1, 2], &[1], &one).contains("equally long, got 2, 2 and 1"));
    assert!(refuse(&[1, -2], &[1, 1], &one).contains("negative: -2 tokens at index 1"));
    assert!(refuse(&[1, 600], &[1, 1], &one).contains("example 1 has 600 tokens, more than the 512 of a row"));
    assert!(refuse(&[1], &[1], &settings(1, 1, 2)).contains("at least ranks = 2, got 1"));
    assert!(refuse(&[1], &[1], &settings(1, 0, 1)).contains("window"));
    assert!(refuse(&[1], &[1], &by_rows(3, 1, 2)).contains("multiple of tokens_per_row * ranks = 1024"));
    assert!(refuse(&[1], &[1], &PlanSettings { tokens_per_step: Some(512), ..one.clone() }).contains("one of them"));
    assert!(refuse(&[1], &[1], &PlanSettings { tokens_per_row: 0, ..one }).contains("at least 1"));
}

// --- rows ---

/// Lengths as examples have them: most around 75, one in thirty up to 512.
fn example_lengths(count: usize) -> Vec<i32> {
    let mut draws = Draws::new(7, "plan", "lengths");
    let mut length = || {
        if draws.unit() < 0.033 {
            return draws.between(100, 512) as i32;
        }
        let bell = (0..12).map(|_| draws.unit()).sum::<f64>() - 6.0;
        ((75.0 * (0.41 * bell).exp()).round() as i32).clamp(8, 512)
    };
    (0..count).map(|_| length()).collect()
}

fn sum(lengths: &[i32]) -> usize {
    lengths.iter().map(|&length| length as usize).sum()
}

/// The longest first, each into the fullest row that takes it, found by looking at all of them.
fn best_fit_by_scan(lengths: &[i32], contexts: &[i32], limits: RowLimits) -> usize {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(lengths[at]));
    let mut rows: Vec<(usize, usize, usize)> = Vec::new();
    for at in order {
        let (length, context) = (lengths[at] as usize, contexts[at] as usize);
        let fits = |&(tokens, in_contexts, examples): &(usize, usize, usize)| {
            tokens + length <= limits.tokens
                && limits.context_tokens.is_none_or(|budget| in_contexts + context <= budget)
                && limits.examples.is_none_or(|most| examples < most)
        };
        match rows.iter_mut().filter(|row| fits(row)).min_by_key(|row| limits.tokens - row.0) {
            Some(row) => *row = (row.0 + length, row.1 + context, row.2 + 1),
            None => rows.push((length, context, 1)),
        }
    }
    rows.len()
}

fn check_rows(rows: &Rows, lengths: &[i32], contexts: &[i32], limits: RowLimits) -> Result<(), TestCaseError> {
    let mut seen: Vec<i32> = rows.order.clone();
    seen.sort_unstable();
    prop_assert_eq!(seen, (0..lengths.len() as i32).collect::<Vec<_>>());
    prop_assert_eq!(rows.offsets.first(), Some(&0));
    prop_assert_eq!(rows.offsets.last(), Some(&(lengths.len() as i64)));
    for row in rows.iter() {
        let of = |lengths: &[i32]| row.iter().map(|&at| lengths[at as usize]).collect::<Vec<_>>();
        let tokens = match limits.layout {
            Layout::Packed => sum(&of(lengths)),
            Layout::Padded => row.len() * of(lengths).into_iter().max().unwrap_or(0) as usize,
        };
        prop_assert!(!row.is_empty());
        if row.len() == 1 && limits.longer == Longer::Alone {
            continue;
        }
        prop_assert!(tokens <= limits.tokens, "{} tokens in {:?}", tokens, row);
        prop_assert!(limits.context_tokens.is_none_or(|budget| sum(&of(contexts)) <= budget));
        prop_assert!(limits.examples.is_none_or(|most| row.len() <= most));
    }
    Ok(())
}

/// No example is taken before its turn by more than the reach, and none waits while the turn is its own.
fn check_reach(rows: &Rows, reach: usize) -> Result<(), TestCaseError> {
    let mut placed = vec![false; rows.order.len()];
    for row in rows.iter() {
        let waiting: Vec<usize> = (0..placed.len()).filter(|&at| !placed[at]).collect();
        prop_assert!(row.contains(&(waiting[0] as i32)), "{:?} leaves {} waiting", row, waiting[0]);
        for &at in row {
            let before = waiting.iter().position(|&other| other == at as usize).unwrap();
            // What the row itself took is out of the way of the later ones.
            prop_assert!(before < reach + row.len(), "{} comes {} early", at, before);
            placed[at as usize] = true;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases::cases(256))]

    #[test]
    fn rows_hold_everything_once_and_are_as_full_as_best_fit(
        sizes in prop::collection::vec((0i32..150, 0i32..300), 1..200), shift in 0i32..60, budget in 210usize..700,
        (contexts, most) in (prop::option::of(300usize..1500), prop::option::of(1usize..9)), padded in any::<bool>(),
    ) {
        let lengths: Vec<i32> = sizes.iter().map(|size| size.0 + shift).collect();
        let context_lengths: Vec<i32> = sizes.iter().map(|size| size.1).collect();
        let layout = if padded { Layout::Padded } else { Layout::Packed };
        let limits = RowLimits { context_tokens: contexts, examples: most, layout, ..RowLimits::of_tokens(budget) };
        let rows = pack_rows(&lengths, &context_lengths, limits, Reach::All).unwrap();
        check_rows(&rows, &lengths, &context_lengths, limits)?;
        if !padded {
            let scanned = best_fit_by_scan(&lengths, &context_lengths, limits);
            prop_assert!(rows.len() <= scanned, "{} rows, best fit decreasing makes {}", rows.len(), scanned);
        }
    }

    #[test]
    fn a_window_keeps_the_order_of_arrival(
        lengths in prop::collection::vec(0i32..100, 1..300), budget in 60usize..300, reach in 1usize..40,
        most in prop::option::of(1usize..9),
    ) {
        let limits = RowLimits { examples: most, longer: Longer::Alone, ..RowLimits::of_tokens(budget) };
        let rows = pack_rows(&lengths, &[], limits, Reach::Next(reach)).unwrap();
        check_rows(&rows, &lengths, &lengths, limits)?;
        check_reach(&rows, reach)?;
        let one = pack_rows(&lengths, &[], limits, Reach::Next(1)).unwrap();
        prop_assert_eq!(one.order, (0..lengths.len() as i32).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_longer_than_a_row_stands_alone(
        sizes in prop::collection::vec((0i32..300, 0i32..300), 1..100), padded in any::<bool>(),
        contexts in prop::option::of(50usize..200), reach in prop::option::of(1usize..40),
    ) {
        let (lengths, context_lengths): (Vec<i32>, Vec<i32>) = sizes.into_iter().unzip();
        let layout = if padded { Layout::Padded } else { Layout::Packed };
        let limits =
            RowLimits { context_tokens: contexts, layout, longer: Longer::Alone, ..RowLimits::of_tokens(150) };
        let rows = pack_rows(&lengths, &context_lengths, limits, reach.map_or(Reach::All, Reach::Next)).unwrap();
        check_rows(&rows, &lengths, &context_lengths, limits)?;
    }
}

#[test]
fn example_lengths_fill_rows_to_the_last_token() {
    let lengths = example_lengths(100_000);
    for budget in [2048, 4096, 16384] {
        for reach in [Reach::All, Reach::Next(4096), Reach::Next(256)] {
            let rows = pack_rows(&lengths, &[], RowLimits::of_tokens(budget), reach).unwrap().len();
            let least = sum(&lengths).div_ceil(budget);
            assert!(rows <= least + least / 1000, "{budget} {reach:?}: {rows} rows, at least {least}");
        }
    }
}

#[test]
fn the_tightest_of_several_limits_is_used_up() {
    let lengths = example_lengths(20_000);
    let contexts: Vec<i32> = example_lengths(20_000).iter().rev().map(|length| 2 * length).collect();
    for (tokens, context_tokens, examples, most) in [
        (2048, Some(3000), None, 1.01),
        (2048, Some(9000), Some(50), 1.01),
        (2048, None, Some(10), 1.01),
        (512, Some(1024), Some(7), 1.1),
    ] {
        let limits = RowLimits { context_tokens, examples, ..RowLimits::of_tokens(tokens) };
        let rows = pack_rows(&lengths, &contexts, limits, Reach::All).unwrap().len();
        let least = sum(&lengths)
            .div_ceil(tokens)
            .max(context_tokens.map_or(0, |budget| sum(&contexts).div_ceil(budget)))
            .max(examples.map_or(0, |most| lengths.len().div_ceil(most)));
        assert!(rows as f64 <= most * least as f64, "{limits:?}: {rows} rows, at least {least}");
    }
}

#[test]
fn wrong_limits_are_refused() {
    let refuse = |lengths: &[i32], contexts: &[i32], limits, reach| {
        pack_rows(lengths, contexts, limits, reach).unwrap_err().to_string()
    };
    let limits = RowLimits::of_tokens(8);
    let both = RowLimits { context_tokens: Some(9), ..limits };
    assert!(
        refuse(&[3, 9, 2, 10], &[], limits, Reach::All)
            .contains("example 1 has 9 tokens, more than the 8 of a row, and so have 1 after it")
    );
    assert!(refuse(&[3, 4], &[3, 10], both, Reach::All).contains("example 1 has 10 context tokens, more than the 9"));
    assert!(refuse(&[3, 4], &[3], both, Reach::All).contains("got 1 for 2 examples"));
    assert!(refuse(&[3, -4], &[], limits, Reach::All).contains("negative: -4 tokens at index 1"));
    assert!(refuse(&[3], &[], limits, Reach::Next(0)).contains("window"));
    for none in [
        RowLimits { tokens: 0, ..limits },
        RowLimits { examples: Some(0), ..limits },
        RowLimits { context_tokens: Some(0), ..limits },
    ] {
        assert!(refuse(&[3], &[3], none, Reach::All).contains("at least 1"));
    }
    assert!(pack_rows(&[], &[], limits, Reach::All).unwrap().is_empty());
}
