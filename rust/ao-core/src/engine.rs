//! The tokenizer engine, with another splitter where its own fails or leaves speed lying.
//!
//! `tokenizers` 1.0.0-rc.3 splits with hand-written grammars for the common patterns. Its reader of `tokenizer.json`
//! gives every other pattern (Qwen 3.5's, for one) no engine at all, and encoding fails, although the regex is compiled
//! in; here such a splitter is built again with its regex. Gemma's tokenizers do not split at all, so that a text is one
//! merge problem and no word is ever met twice; here it is cut at words where no merge can reach across.
//! With another splitter the pipeline's stages are run from here, in the engine's order; each is the engine's own.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use memchr::memmem;
use serde_json::{Value, json};

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pipeline::{
    EncodeOptions, Model, Override, PipelineModelScratch, PipelinePatternMatcher, PipelinePreTokenizer, PipelineToken,
    PipelineTokenizer, PreTokenizer, PreTokenizerScratch, Segment, Span, SpecialSegmentIterator, normalize_all,
};
use tokenizers::pre_tokenizers::sequence::PipelineSequence;
use tokenizers::pre_tokenizers::split::{Search, Split, SplitPattern};

use crate::error::{Error, Result};
use crate::older::Patterns;

/// What one thread needs to encode.
struct Scratch {
    model: PipelineModelScratch,
    splitter: PreTokenizerScratch,
    spans: Vec<Span>,
}

/// What cuts normalized text into what the model merges.
enum Splitter {
    /// The pipeline's own, with its regexes.
    Regex(PipelinePreTokenizer),
    /// Before each run of U+2581 that does not follow one of these characters.
    Words(Bound),
}

/// The characters behind which a text is not cut.
struct Bound {
    ascii: [bool; 128],
    others: HashSet<char>,
}

impl Bound {
    fn holds(&self, character: char) -> bool {
        self.ascii.get(character as usize).copied().unwrap_or_else(|| self.others.contains(&character))
    }
}

/// What a space becomes where words are not split off.
pub(crate) const SPACE: char = '\u{2581}';

/// A tokenizer that encodes and decodes.
pub(crate) struct Engine {
    pipeline: PipelineTokenizer,
    /// What splits instead of the pipeline's own splitter.
    splitter: Option<Splitter>,
    /// The patterns of that splitter that run in a regex engine.
    patterns: Patterns,
    /// Whether the normalizer does nothing but write U+2581 for a space, and no added token is sought behind it.
    only_marks_spaces: bool,
    /// Kept between calls, because the model's word cache lives here.
    pool: Mutex<Vec<Scratch>>,
}

impl Engine {
    /// Build from a canonical `tokenizer.json`.
    pub(crate) fn from_canonical_json(root: &Value) -> Result<Self> {
        let pipeline = tokenizers::from_json(&root.to_string()).map_err(Error::tokenizer)?;
        let mut patterns = Patterns::default();
        let splitter = match pipeline.get_pre_tokenizer() {
            own if lacks_regex(own) => {
                patterns = Patterns::of(&root["pre_tokenizer"])?;
                Some(Splitter::Regex(with_regex(own)?))
            }
            own if splits_nothing(own) => bound_before_space(&root["model"]).map(Splitter::Words),
            _ => None,
        };
        let only_marks_spaces = root["normalizer"]
            == json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"})
            && matches!(pipeline.get_normalizers(), [_])
            && root["added_tokens"]
                .as_array()
                .is_none_or(|added| added.iter().all(|token| token["normalized"] == false));
        Ok(Self { pipeline, splitter, patterns, only_marks_spaces, pool: Mutex::new(Vec::new()) })
    }

    pub(crate) fn only_marks_spaces(&self) -> bool {
        self.only_marks_spaces
    }

    /// The ids of `text`.
    pub(crate) fn ids(&self, text: &str) -> Result<Vec<i32>> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + 4);
        self.encode_into(text, &mut tokens)?;
        Ok(tokens.into_iter().map(|token| token.id() as i32).collect())
    }

    /// Append the ids of `text`, whose special tokens are found, to `out`.
    fn encode_into(&self, text: &str, out: &mut Vec<PipelineToken>) -> Result<()> {
        let Some(splitter) = &self.splitter else {
            let options = EncodeOptions {
                add_special_tokens: false,
                encode_special_tokens: false,
                padding: Override::Off,
                truncation: Override::Off,
            };
            return self.pipeline.encode_into(text, &options, out).map_err(Error::tokenizer);
        };
        let mut scratch = self.borrow_scratch();
        let done = self.encode_with(splitter, text, &mut scratch, out);
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        done
    }

    fn borrow_scratch(&self) -> Scratch {
        let kept = self.pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| Scratch {
            model: self.pipeline.get_model().init_scratch(),
            splitter: PreTokenizerScratch::default(),
            spans: Vec::new(),
        })
    }

    /// Added tokens of the raw text, normalizer, added tokens of the normalized text, splitter, model.
    fn encode_with(
        &self,
        splitter: &Splitter,
        text: &str,
        scratch: &mut Scratch,
        out: &mut Vec<PipelineToken>,
    ) -> Result<()> {
        let added = self.pipeline.get_added_vocabulary();
        for segment in SpecialSegmentIterator::new(text, added, false, false) {
            let (chunk, offset) = match segment {
                Segment::SpecialToken(id) => {
                    out.push(PipelineToken::from(id));
                    continue;
                }
                Segment::Text { text, input_offset } => (text, input_offset),
            };
            let normalized = self.normalize(chunk, offset)?;
            for segment in SpecialSegmentIterator::new(&normalized, added, true, false) {
                match segment {
                    Segment::SpecialToken(id) => out.push(PipelineToken::from(id)),
                    Segment::Text { text, .. } => {
                        self.split(splitter, text, scratch)?;
                        self.pipeline
                            .get_model()
                            .tokenize_spans(text, &scratch.spans, &mut scratch.model, out)
                            .map_err(Error::tokenizer)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Cut `text`, which is normalized, into `scratch.spans`.
    fn split(&self, splitter: &Splitter, text: &str, scratch: &mut Scratch) -> Result<()> {
        if u32::try_from(text.len()).is_err() {
            return Err(Error::input(format!("a text of {} bytes is longer than the tokenizer can take", text.len())));
        }
        scratch.spans.clear();
        let regular = match splitter {
            Splitter::Words(bound) if !text.contains(' ') => {
                words(text, bound, &mut scratch.spans);
                return Ok(());
            }
            Splitter::Words(_) => self.pipeline.get_pre_tokenizer(),
            Splitter::Regex(splitter) => splitter,
        };
        regular.pre_tokenize(text, &mut scratch.splitter, &mut scratch.spans).map_err(Error::tokenizer)?;
        let last = scratch.spans.last().map_or(0, |span| span.start as usize);
        self.patterns.check_last(text, last)
    }

    /// What the model sees of `chunk`, which begins at byte `offset` of its text.
    pub(crate) fn normalize<'a>(&self, chunk: &'a str, offset: usize) -> Result<std::borrow::Cow<'a, str>> {
        normalize_all(self.pipeline.get_normalizers(), chunk, offset).map_err(Error::tokenizer)
    }

    /// The first added token at or after byte `at`: its bytes and its id.
    pub(crate) fn next_added(&self, text: &str, at: usize, normalized: bool) -> Option<((usize, usize), u32)> {
        self.pipeline.get_added_vocabulary().extract_next(text.as_bytes(), at, normalized, false)
    }

    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        self.pipeline.decode(ids, false).map_err(Error::tokenizer)
    }
}

/// Whether a splitter holds a pattern for which the engine has neither a grammar nor a regex.
fn lacks_regex(splitter: &PipelinePreTokenizer) -> bool {
    match splitter {
        PipelinePreTokenizer::Split(split) => {
            let by_grammar =
                split.grammar().is_some() && !split.invert && split.behavior == SplitDelimiterBehavior::Isolated;
            matches!(split.search, Search::Unavailable) && !by_grammar
        }
        PipelinePreTokenizer::Sequence(sequence) => {
            !sequence.is_deepseek() && sequence.pre_tokenizers().iter().any(lacks_regex)
        }
        _ => false,
    }
}

/// The same splitter with its regexes compiled.
fn with_regex(splitter: &PipelinePreTokenizer) -> Result<PipelinePreTokenizer> {
    match splitter {
        PipelinePreTokenizer::Split(split) => {
            Split::new(split.pattern.clone(), split.behavior, split.invert).map(PipelinePreTokenizer::Split).map_err(
                |error| Error::tokenizer(format!("its split pattern {:?} does not compile: {error}", split.pattern)),
            )
        }
        PipelinePreTokenizer::Sequence(sequence) => {
            let members = sequence.pre_tokenizers().iter().map(with_regex).collect::<Result<Vec<_>>>()?;
            Ok(PipelinePreTokenizer::Sequence(PipelineSequence::new(members)))
        }
        other => Ok(other.clone()),
    }
}

/// Whether a splitter leaves a text without a space in one piece.
fn splits_nothing(splitter: &PipelinePreTokenizer) -> bool {
    match splitter {
        PipelinePreTokenizer::None => true,
        PipelinePreTokenizer::Split(split) => {
            matches!(&split.pattern, SplitPattern::String(pattern) if pattern == " ") && !split.invert
        }
        _ => false,
    }
}

/// The characters that some entry has right before a U+2581, or `None` if the model does not merge plain characters.
///
/// A merge makes an entry, so no merge joins another character with a U+2581 behind it: there the text can be cut and
/// the pieces merged alone, with the same result.
fn bound_before_space(model: &Value) -> Option<Bound> {
    let absent = |key: &str| matches!(&model[key], Value::Null | Value::Bool(false));
    let plain = model["type"] == "BPE"
        && ["byte_level", "ignore_merges", "dropout"].into_iter().all(absent)
        && ["continuing_subword_prefix", "end_of_word_suffix"]
            .into_iter()
            .all(|key| model[key].as_str().is_none_or(str::is_empty));
    let vocabulary = model["vocab"].as_object().filter(|vocabulary| plain && vocabulary.contains_key("\u{2581}"))?;
    let mut bound = Bound { ascii: [false; 128], others: HashSet::new() };
    for entry in vocabulary.keys() {
        let mut before = SPACE;
        for character in entry.chars() {
            if character == SPACE && before != SPACE {
                match bound.ascii.get_mut(before as usize) {
                    Some(held) => *held = true,
                    None => drop(bound.others.insert(before)),
                }
            }
            before = character;
        }
    }
    Some(bound)
}

/// Cut before each run of U+2581, except behind a character of `bound`.
fn words(text: &str, bound: &Bound, spans: &mut Vec<Span>) {
    let mut start = 0;
    for at in memmem::find_iter(text.as_bytes(), "\u{2581}") {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|before| before != SPACE && !bound.holds(before)) {
            spans.push(Span::new(start as u32, at as u32));
            start = at;
        }
    }
    spans.push(Span::new(start as u32, text.len() as u32));
}
