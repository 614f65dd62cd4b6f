//! Random draws that depend on a key and on nothing else.
//!
//! Every draw is a hash of a counter under a key made of the seed, an id and a purpose. So an example draws the same
//! numbers whatever stands before it, however many threads run and whatever else is drawn for it.

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

/// A generator for one purpose of one id.
#[derive(Debug, Clone)]
pub struct Draws {
    key: [u8; 16],
    counter: u64,
}

impl Draws {
    /// The draws of `(seed, id, purpose)`.
    #[must_use]
    pub fn new(seed: u64, id: &str, purpose: &str) -> Self {
        let inner = xxh3_128_with_seed(id.as_bytes(), seed);
        let outer = xxh3_128_with_seed(purpose.as_bytes(), seed ^ 0x9e37_79b9_7f4a_7c15);
        let mut joined = [0; 32];
        joined[..16].copy_from_slice(&inner.to_le_bytes());
        joined[16..].copy_from_slice(&outer.to_le_bytes());
        Self { key: xxh3_128_with_seed(&joined, seed).to_le_bytes(), counter: 0 }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let drawn = xxh3_64_with_seed(&self.key, self.counter);
        self.counter += 1;
        drawn
    }

    /// A whole number below `bound`, each equally likely. `bound` must not be zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "a draw needs at least one outcome");
        // Multiply and keep the high half; the few low halves that would favour some outcomes are drawn again.
        let uneven = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.bits()) * u128::from(bound);
            if (product as u64) >= uneven {
                return (product >> 64) as u64;
            }
        }
    }

    /// A whole number in `low..=high`, each equally likely.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        assert!(low <= high, "an empty range has nothing to draw");
        low + match ((high - low) as u64).checked_add(1) {
            Some(bound) => self.below(bound) as usize,
            None => self.bits() as usize,
        }
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Put `items` in random order, each order equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.between(0, last));
        }
    }
}
