//! The tokenizer that transformers uses: what the engine has to equal, and what encodes where it does not.

use std::borrow::Cow;

use fancy_regex::Regex;
use serde_json::Value;
use tokenizers_0_23::Tokenizer;

use crate::error::{Error, Result};
use crate::span::ByteSpan;

/// Its version, which `Cargo.toml` pins.
pub(crate) const VERSION: &str = "0.23.2";

/// `tokenizers` 0.23 with one `tokenizer.json`.
pub(crate) struct Older {
    tokenizer: Tokenizer,
    patterns: Patterns,
}

impl Older {
    /// Build from a `tokenizer.json` without truncation and padding.
    pub(crate) fn new(root: &Value) -> Result<Self> {
        let mut root = Cow::Borrowed(root);
        if !root["post_processor"].is_null() {
            // It only adds special tokens, which nobody asks for, and trims offsets.
            root.to_mut()["post_processor"] = Value::Null;
        }
        let tokenizer = serde_json::from_value(root.into_owned()).map_err(Error::tokenizer)?;
        Ok(Self { tokenizer, patterns: Patterns::default() })
    }

    /// Keep watch over these patterns, when it is to encode more than probes.
    pub(crate) fn watched(self, patterns: Patterns) -> Self {
        Self { patterns, ..self }
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Vec<i32>> {
        self.patterns.check(text)?;
        let encoding = self.tokenizer.encode_fast(text, false).map_err(Error::tokenizer)?;
        Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
    }

    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(Error::tokenizer)
    }

    /// The bytes that each token covers, whole characters; `ids` must be what `text` encodes to.
    pub(crate) fn spans(&self, text: &str, ids: &[i32]) -> Result<Vec<ByteSpan>> {
        let encoding = self.tokenizer.encode(text, false).map_err(Error::tokenizer)?;
        if !encoding.get_ids().iter().map(|&id| id as i32).eq(ids.iter().copied()) {
            return Err(Error::tokenizer("the tokens are not those of their text, so they have no spans"));
        }
        let boundary = |mut at: usize, step: isize| {
            while !text.is_char_boundary(at) {
                at = at.saturating_add_signed(step);
            }
            at.min(text.len())
        };
        let offsets = encoding.get_offsets().iter();
        Ok(offsets.map(|&(start, end)| ByteSpan { start: boundary(start, -1), end: boundary(end, 1) }).collect())
    }
}

/// The split patterns of a tokenizer that run in a regex engine.
///
/// fancy-regex gives up after a million backtracking steps, and both tokenizers then leave the rest of a text in one
/// piece without a word: other ids than another version's, which nothing notices.
#[derive(Default)]
pub(crate) struct Patterns(Vec<Regex>);

impl Patterns {
    /// Those of a tokenizer's splitter, a member of its `tokenizer.json`.
    pub(crate) fn of(splitter: &Value) -> Result<Self> {
        let mut found = Vec::new();
        collect(splitter, &mut found);
        let compiled = found.into_iter().map(|pattern| {
            Regex::new(pattern)
                .map_err(|error| Error::tokenizer(format!("its split pattern {pattern:?} does not compile: {error}")))
        });
        Ok(Self(compiled.collect::<Result<_>>()?))
    }

    /// That no pattern gives up on `text`.
    ///
    /// # Errors
    /// If one does.
    pub(crate) fn check(&self, text: &str) -> Result<()> {
        for pattern in &self.0 {
            if let Some(error) = pattern.find_iter(text).find_map(std::result::Result::err) {
                return Err(gave_up(pattern, text, &error));
            }
        }
        Ok(())
    }

    /// The same, where a single pattern has cut `text` and `last` is where the last piece begins: one that gave up did so
    /// there.
    ///
    /// # Errors
    /// If it did.
    pub(crate) fn check_last(&self, text: &str, last: usize) -> Result<()> {
        let [pattern] = &self.0[..] else { return self.check(text) };
        match pattern.find_from_pos(text, last) {
            Ok(_) => Ok(()),
            Err(error) => Err(gave_up(pattern, text, &error)),
        }
    }
}

fn gave_up(pattern: &Regex, text: &str, error: &fancy_regex::Error) -> Error {
    Error::tokenizer(format!(
        "its split pattern {:?} gives up on a text of {} bytes ({error}), so its tokens would depend on the version; \
         shorten the text, or its longest run of one kind of character",
        pattern.as_str(),
        text.len()
    ))
}

fn collect<'a>(splitter: &'a Value, found: &mut Vec<&'a str>) {
    match splitter {
        Value::Object(members) => {
            for (key, member) in members {
                match member.as_str() {
                    Some(pattern) if key == "Regex" => found.push(pattern),
                    _ => collect(member, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
        _ => {}
    }
}
