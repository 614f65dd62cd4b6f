//! The tokenizer engine, with the split patterns that its own reader leaves without a regex.
//!
//! `tokenizers` 1.0.0-rc.3 splits with hand-written grammars for the common patterns. Its reader of `tokenizer.json`
//! gives every other pattern (Qwen 3.5's, for one) no engine at all, and encoding fails, although the regex is compiled
//! in. For such a tokenizer the splitter is built again with its regex, and the pipeline's stages are run from here, in
//! the order in which the engine runs them; everything else is the engine's own.

use std::sync::{Mutex, PoisonError};

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pipeline::{
    EncodeOptions, Model, Override, PipelineModelScratch, PipelinePatternMatcher, PipelinePreTokenizer, PipelineToken,
    PipelineTokenizer, PreTokenizer, PreTokenizerScratch, Segment, Span, SpecialSegmentIterator, normalize_all,
};
use tokenizers::pre_tokenizers::sequence::PipelineSequence;
use tokenizers::pre_tokenizers::split::{Search, Split};

use crate::error::{Error, Result};

/// What one thread needs to encode.
struct Scratch {
    model: PipelineModelScratch,
    splitter: PreTokenizerScratch,
    spans: Vec<Span>,
}

/// A tokenizer that encodes and decodes.
pub(crate) struct Engine {
    pipeline: PipelineTokenizer,
    /// The splitter with its regexes, where the pipeline's own cannot be used.
    splitter: Option<PipelinePreTokenizer>,
    /// Kept between calls, because the model's word cache lives here.
    pool: Mutex<Vec<Scratch>>,
}

impl Engine {
    /// Build from the text of a canonical `tokenizer.json`.
    pub(crate) fn from_canonical_json(text: &str) -> Result<Self> {
        let pipeline = tokenizers::from_json(text).map_err(Error::tokenizer)?;
        let splitter = match pipeline.get_pre_tokenizer() {
            own if lacks_regex(own) => Some(with_regex(own)?),
            _ => None,
        };
        Ok(Self { pipeline, splitter, pool: Mutex::new(Vec::new()) })
    }

    /// Append the ids of `text`, whose special tokens are found, to `out`.
    pub(crate) fn encode_into(&self, text: &str, out: &mut Vec<PipelineToken>) -> Result<()> {
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
        splitter: &PipelinePreTokenizer,
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
                        scratch.spans.clear();
                        splitter
                            .pre_tokenize(text, &mut scratch.splitter, &mut scratch.spans)
                            .map_err(Error::tokenizer)?;
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
