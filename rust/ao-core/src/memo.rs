//! Prompts that were framed before.
//!
//! A mixture asks few questions many times over: a thousand read lengths, labels and layers make up most of a million
//! prompts. A prompt depends on its layers, the number of its placeholders and its question alone, so it is tokenized once
//! and kept while there is room.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use xxhash_rust::xxh3::Xxh3;

use crate::error::Result;
use crate::frame::Framer;

/// The tokens of a prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<i32>,
    pub(crate) placeholders: Vec<i32>,
}

/// How many parts the memo has, so that threads seldom meet in one.
const PARTS: usize = 64;
/// How many tokens a part keeps; then it is emptied. 32 MB over all parts.
const TOKENS_PER_PART: usize = 1 << 17;

#[derive(Default)]
struct Part {
    prompts: HashMap<u128, Arc<Prompt>>,
    num_tokens: usize,
}

/// Prompts by what decides their tokens, for one framer.
pub(crate) struct Prompts(Vec<RwLock<Part>>);

impl Prompts {
    pub(crate) fn new() -> Self {
        Self((0..PARTS).map(|_| RwLock::default()).collect())
    }

    /// What [`Framer::prompt`] gives, with the same `framer` every time.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn get(
        &self,
        framer: &Framer,
        layers: &[usize],
        num_positions: usize,
        question: &str,
    ) -> Result<Arc<Prompt>> {
        let key = key(layers, num_positions, question);
        let part = &self.0[key as usize % PARTS];
        if let Some(prompt) = part.read().unwrap_or_else(PoisonError::into_inner).prompts.get(&key) {
            return Ok(Arc::clone(prompt));
        }
        let new = framer.prompt(layers, num_positions, question)?;
        let prompt = Arc::new(Prompt { ids: new.ids, placeholders: new.placeholders });
        let mut part = part.write().unwrap_or_else(PoisonError::into_inner);
        if part.num_tokens > TOKENS_PER_PART {
            *part = Part::default();
        }
        part.num_tokens += prompt.ids.len() + prompt.placeholders.len();
        part.prompts.insert(key, Arc::clone(&prompt));
        Ok(prompt)
    }
}

fn key(layers: &[usize], num_positions: usize, question: &str) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(&layers.len().to_le_bytes());
    for layer in layers {
        hasher.update(&layer.to_le_bytes());
    }
    hasher.update(&num_positions.to_le_bytes());
    hasher.update(question.as_bytes());
    hasher.digest128()
}
