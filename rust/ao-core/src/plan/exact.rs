//! Rows of one token budget, filled to the last token.
//!
//! Examples are taken as they come until about two more would fill the row; then a pair, one or three of the waiting
//! lengths that fit exactly are looked up. As long as lengths are many and mixed there nearly always are such. Only the
//! lengths are dealt with at first: of equal examples the first always goes first, so who it is can be filled in later.

use super::rows::{Reach, Rows};

/// How many lengths are tried as the first of three.
const TRIPLES: usize = 8;

pub(super) fn pack(lengths: &[i32], budget: usize, reach: Reach) -> Rows {
    let reach = match reach {
        Reach::All => usize::MAX,
        Reach::Next(count) => count,
    };
    let mut filler = Filler::new(lengths, budget);
    let mut taken = Vec::with_capacity(lengths.len());
    let mut offsets = vec![0];
    while taken.len() < lengths.len() {
        filler.fill_up(reach);
        filler.row(&mut taken);
        offsets.push(taken.len() as i64);
    }
    Rows { order: name(lengths, taken, budget), offsets }
}

/// The examples that have these lengths: of equal ones, the first comes first.
fn name(lengths: &[i32], taken: Vec<i32>, budget: usize) -> Vec<i32> {
    // Those above the budget all go in turn, so that they may count as equal.
    let place = |length: i32| (length as usize).min(budget + 1);
    let mut next = vec![0; budget + 3];
    for &length in lengths {
        next[place(length) + 1] += 1;
    }
    for length in 1..next.len() {
        next[length] += next[length - 1];
    }
    let mut by_length = vec![0; lengths.len()];
    let mut end = next.clone();
    for (at, &length) in lengths.iter().enumerate() {
        let end = &mut end[place(length)];
        by_length[*end] = at as i32;
        *end += 1;
    }
    let first = |length: i32| {
        let next = &mut next[place(length)];
        *next += 1;
        by_length[*next - 1]
    };
    // In place: fresh memory costs as much as the rest.
    taken.into_iter().map(first).collect()
}

struct Filler<'a> {
    lengths: &'a [i32],
    budget: usize,
    /// The lengths within reach that have no row.
    waiting: Waiting,
    /// By length: how many were taken out of turn and are passed over when the turn comes to them.
    passed: Vec<u32>,
    /// The first example whose turn has not come.
    head: usize,
    /// The first example out of reach.
    tail: usize,
    held: usize,
    /// Room that the examples taken in turn leave for those that fit exactly.
    reserve: usize,
}

impl<'a> Filler<'a> {
    fn new(lengths: &'a [i32], budget: usize) -> Self {
        let tokens: usize = lengths.iter().map(|&length| length as usize).sum();
        Self {
            lengths,
            budget,
            waiting: Waiting::new(budget),
            passed: vec![0; budget + 1],
            head: 0,
            tail: 0,
            held: 0,
            reserve: 2 * tokens / lengths.len().max(1),
        }
    }

    fn fill_up(&mut self, reach: usize) {
        while self.tail < self.lengths.len() && self.held < reach {
            self.waiting.put(self.lengths[self.tail] as usize);
            self.tail += 1;
            self.held += 1;
        }
    }

    /// The length whose turn it is, if it is within reach.
    fn turn(&mut self) -> Option<usize> {
        while self.head < self.tail {
            let length = self.lengths[self.head] as usize;
            match self.passed.get_mut(length) {
                Some(passed) if *passed > 0 => *passed -= 1,
                _ => return Some(length),
            }
            self.head += 1;
        }
        None
    }

    /// Append the lengths of one row.
    fn row(&mut self, taken: &mut Vec<i32>) {
        let first = taken.len();
        let mut room = self.budget;
        while let Some(length) = self.turn() {
            let starts = taken.len() == first;
            if starts && length > self.budget {
                self.head += 1;
                taken.push(length as i32);
                self.held -= 1;
                return;
            }
            if length > room || (!starts && length + self.reserve > room) {
                break;
            }
            self.head += 1;
            self.waiting.take(length);
            taken.push(length as i32);
            room -= length;
        }
        while room > 0 {
            let (fits, count) = self.waiting.filling(room);
            for &length in &fits[..count] {
                self.waiting.take(length);
                self.passed[length] += 1;
                taken.push(length as i32);
                room -= length;
            }
            if count == 0 {
                break;
            }
        }
        self.held -= taken.len() - first;
    }
}

/// A multiset of lengths up to a budget, as counts and as bits, forwards and backwards: bit `i` of `forward` is length
/// `i`, of `backward` length `budget - i`. Shifted against each other they show all pairs of one sum at once.
struct Waiting {
    budget: usize,
    counts: Vec<u32>,
    forward: Vec<u64>,
    backward: Vec<u64>,
}

impl Waiting {
    fn new(budget: usize) -> Self {
        let words = budget / 64 + 2;
        Self { budget, counts: vec![0; budget + 1], forward: vec![0; words], backward: vec![0; words] }
    }

    /// Add a length; one above the budget, or of zero, fits nothing and is left out.
    fn put(&mut self, length: usize) {
        if length == 0 || length > self.budget {
            return;
        }
        self.counts[length] += 1;
        if self.counts[length] == 1 {
            self.flip(length);
        }
    }

    fn take(&mut self, length: usize) {
        if length == 0 {
            return;
        }
        self.counts[length] -= 1;
        if self.counts[length] == 0 {
            self.flip(length);
        }
    }

    fn flip(&mut self, length: usize) {
        self.forward[length / 64] ^= 1 << (length % 64);
        let back = self.budget - length;
        self.backward[back / 64] ^= 1 << (back % 64);
    }

    /// Up to three lengths that fill the room exactly; else the longest one that fits; else none.
    fn filling(&mut self, room: usize) -> ([usize; 3], usize) {
        if let Some((a, b)) = self.pair(room) {
            return ([a, b, 0], 2);
        }
        if self.counts[room] > 0 {
            return ([room, 0, 0], 1);
        }
        let longest = self.at_most(room);
        let mut first = longest;
        for _ in 0..TRIPLES {
            let Some(length) = first else { break };
            self.take(length);
            let pair = self.pair(room - length);
            self.put(length);
            if let Some((a, b)) = pair {
                return ([length, a, b], 3);
            }
            first = self.at_most(length - 1);
        }
        longest.map_or(([0; 3], 0), |length| ([length, 0, 0], 1))
    }

    /// The longest waiting length of at most `most`.
    fn at_most(&self, most: usize) -> Option<usize> {
        let mut at = most / 64;
        let mut word = self.forward[at] & (u64::MAX >> (63 - most % 64));
        while word == 0 {
            at = at.checked_sub(1)?;
            word = self.forward[at];
        }
        Some(at * 64 + 63 - word.leading_zeros() as usize)
    }

    /// Two waiting lengths that add up to `sum`, the evenest.
    fn pair(&self, sum: usize) -> Option<(usize, usize)> {
        let half = sum / 2;
        let shift = self.budget - sum;
        for at in (0..=half / 64).rev() {
            let (word, bit) = ((shift + at * 64) / 64, (shift + at * 64) % 64);
            let low = self.backward[word] >> bit;
            let high = if bit == 0 { 0 } else { self.backward.get(word + 1).unwrap_or(&0) << (64 - bit) };
            let mut both = self.forward[at] & (low | high);
            if at == half / 64 {
                both &= u64::MAX >> (63 - half % 64);
            }
            while both != 0 {
                let bit = 63 - both.leading_zeros() as usize;
                let a = at * 64 + bit;
                if 2 * a != sum || self.counts[a] > 1 {
                    return Some((a, sum - a));
                }
                both ^= 1 << bit;
            }
        }
        None
    }
}
