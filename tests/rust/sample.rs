//! Draws: even, keyed, and independent of what else is drawn.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::collections::HashMap;

use ao_core::sample::Draws;
use proptest::prelude::*;

/// The squared deviation from even counts stays where chance leaves it (99.99 % of the time, for up to 12 outcomes).
fn assert_even(counts: &HashMap<u64, usize>, outcomes: usize) {
    assert_eq!(counts.len(), outcomes);
    let mean = counts.values().sum::<usize>() as f64 / outcomes as f64;
    let deviation: f64 = counts.values().map(|&count| (count as f64 - mean).powi(2) / mean).sum();
    assert!(deviation < 40.0, "{deviation}: {counts:?}");
}

#[test]
fn each_outcome_is_equally_likely() {
    for bound in [2, 3, 7, 12] {
        let mut draws = Draws::new(1, "id", "purpose");
        let mut counts = HashMap::new();
        (0..60_000).for_each(|_| *counts.entry(draws.below(bound)).or_default() += 1);
        assert_even(&counts, bound as usize);
    }
}

#[test]
fn first_draws_of_many_ids_are_even_and_unlike_those_of_other_purposes() {
    let mut counts = HashMap::new();
    let mut equal = 0;
    for number in 0..60_000 {
        let id = format!("example-{number}");
        let drawn = Draws::new(0, &id, "read").below(10);
        *counts.entry(drawn).or_default() += 1;
        equal += usize::from(drawn == Draws::new(0, &id, "layer").below(10));
    }
    assert_even(&counts, 10);
    assert!((5_600..6_400).contains(&equal), "{equal}");
}

#[test]
fn each_order_is_equally_likely() {
    let mut counts = HashMap::new();
    for seed in 0..24_000 {
        let mut items = [0u64, 1, 2];
        Draws::new(seed, "", "shuffle").shuffle(&mut items);
        *counts.entry(items[0] * 9 + items[1] * 3 + items[2]).or_default() += 1;
    }
    assert_even(&counts, 6);
}

#[test]
fn the_generator_does_not_change() {
    let mut draws = Draws::new(7, "example", "read");
    let numbers: Vec<u64> = (0..4).map(|_| draws.below(1_000_000)).collect();
    assert_eq!(numbers, [99_025, 476_165, 845_111, 791_630]);
}

proptest! {
    #[test]
    fn bounds_hold(seed in any::<u64>(), id in ".{0,8}", low in 0usize..100, width in 0usize..100, bound in 1u64..) {
        let mut draws = Draws::new(seed, &id, "p");
        prop_assert!((low..=low + width).contains(&draws.between(low, low + width)));
        prop_assert!(draws.below(bound) < bound);
        prop_assert!((0.0..1.0).contains(&draws.unit()));
    }
}
