//! Which bytes of a text each of its tokens covers.
//!
//! The text is cut at added tokens and normalized exactly as the engine does it; then the tokens must spell the
//! normalized text byte for byte, and each byte of it is traced back to the original. Anything that does not fit is an
//! error, never a guess. A token that covers part of a character gets the whole character, as Python's offsets do.

use crate::engine::{Engine, SPACE};
use crate::error::{Error, Result};
use crate::span::ByteSpan;
use crate::tokenize::{Backend, Own, Tokenizer};

/// A character that no normalizer changes, drops or joins with a neighbour.
const INERT: &str = "0";

/// A character run longer than this is not one unit of any normalization.
const LONGEST_UNIT: usize = 64;

/// What the normalizer puts in front of a text, and what it makes of a space.
#[derive(Debug)]
pub(crate) struct Probes {
    first: String,
    later: String,
    space: String,
}

impl Probes {
    pub(crate) fn new(engine: &Engine) -> Result<Self> {
        let prefix = |offset: usize| -> Result<String> {
            Ok(engine.normalize(INERT, offset)?.strip_suffix(INERT).unwrap_or_default().to_owned())
        };
        let mut probes = Self { first: prefix(0)?, later: prefix(1)?, space: String::new() };
        probes.space = probes.unit(engine, " ")?.unwrap_or_default();
        Ok(probes)
    }

    /// What the normalizer makes of `unit` inside a text.
    fn unit(&self, engine: &Engine, unit: &str) -> Result<Option<String>> {
        let behind_inert = format!("{INERT}{unit}");
        let normalized = engine.normalize(&behind_inert, 1)?;
        Ok(normalized.strip_prefix(&self.later).and_then(|rest| rest.strip_prefix(INERT)).map(str::to_owned))
    }
}

impl Tokenizer {
    /// The bytes of `text` that each of `ids`, which are its encoding, covers.
    ///
    /// # Errors
    /// If the tokens do not spell the text, which a normalizer or model outside the common families can cause.
    pub fn spans(&self, text: &str, ids: &[i32]) -> Result<Vec<ByteSpan>> {
        self.spans_until(text, ids, text.len())
    }

    /// The spans of the tokens up to the first that begins at or after byte `stop`.
    pub(crate) fn spans_until(&self, text: &str, ids: &[i32], stop: usize) -> Result<Vec<ByteSpan>> {
        let own = match &self.backend {
            Backend::Engine(own) => own,
            Backend::Older(older) => return older.spans(text, ids),
        };
        if let Some(why) = &own.surfaces.refused {
            return Err(Error::Tokenizer(why.clone()));
        }
        let mut walk = Walk { tokenizer: own, ids, stop, spans: Vec::with_capacity(ids.len()) };
        let mut at = 0;
        while at < text.len() && !walk.done() {
            let found = own.engine.next_added(text, at, false);
            let ((start, end), id) = found.unwrap_or(((text.len(), text.len()), 0));
            walk.chunk(&text[at..start], at)?;
            if found.is_some() && !walk.done() {
                walk.added(id, ByteSpan { start, end })?;
            }
            at = end;
        }
        if !walk.done() && walk.spans.len() != ids.len() {
            return Err(walk.mismatch("the text ends"));
        }
        Ok(walk.spans)
    }
}

/// The tokens, and how far they have been placed.
struct Walk<'a> {
    tokenizer: &'a Own,
    ids: &'a [i32],
    /// What begins at or behind this byte is not asked for.
    stop: usize,
    spans: Vec<ByteSpan>,
}

impl Walk<'_> {
    /// Place the next token, which is the added token `id`.
    fn added(&mut self, id: u32, span: ByteSpan) -> Result<()> {
        if self.ids.get(self.spans.len()).copied() != i32::try_from(id).ok() {
            return Err(self.mismatch(&format!("added token {id} is expected")));
        }
        self.spans.push(span);
        Ok(())
    }

    /// Place the tokens of `chunk`, a stretch between added tokens that begins at byte `base`.
    fn chunk(&mut self, chunk: &str, base: usize) -> Result<()> {
        if chunk.is_empty() {
            return Ok(());
        }
        let engine = &self.tokenizer.engine;
        if engine.only_marks_spaces() && !chunk.contains(SPACE) {
            return self.marked_tokens(chunk, base);
        }
        let normalized = engine.normalize(chunk, base)?;
        let origin = if normalized == chunk { Origin::Same(chunk) } else { self.origin(chunk, &normalized, base)? };
        let mut traced = Traced { normalized: &normalized, origin, base };
        let mut at = 0;
        while at < normalized.len() && !self.done() {
            let found = engine.next_added(&normalized, at, true);
            let ((start, end), id) = found.unwrap_or(((normalized.len(), normalized.len()), 0));
            self.model_tokens(&mut traced, at, start)?;
            if found.is_some() && !self.done() {
                self.added(id, traced.original(start, end))?;
            }
            at = end;
        }
        Ok(())
    }

    /// Place the tokens of `chunk`, in which nothing but spaces is written otherwise in the tokens, as U+2581.
    fn marked_tokens(&mut self, chunk: &str, base: usize) -> Result<()> {
        let mut at = 0;
        while at < chunk.len() && !self.done() {
            let Some(&id) = self.ids.get(self.spans.len()) else {
                return Err(self.mismatch("the tokens end before the text"));
            };
            let Some(length) = self.tokenizer.surfaces.marked_length_at(id, chunk, at) else {
                return Err(self.mismatch(&format!("it does not continue {:?}", &chunk[..at_boundary(chunk, at)])));
            };
            self.spans.push(whole_characters(chunk, at, at + length).shifted(base));
            at += length;
        }
        Ok(())
    }

    /// Place the model's tokens that spell the normalized bytes `at..end`.
    fn model_tokens(&mut self, traced: &mut Traced, mut at: usize, end: usize) -> Result<()> {
        while at < end && !self.done() {
            let Some(&id) = self.ids.get(self.spans.len()) else {
                return Err(self.mismatch("the tokens end before the text"));
            };
            let Some(length) = self.tokenizer.surfaces.length_at(id, &traced.normalized[..end], at) else {
                let read = &traced.normalized[..at_boundary(traced.normalized, at)];
                return Err(self.mismatch(&format!("it does not continue {read:?}")));
            };
            self.spans.push(traced.original(at, at + length));
            at += length;
        }
        Ok(())
    }

    /// Whether everything that is asked for has been placed.
    fn done(&self) -> bool {
        self.spans.last().is_some_and(|last| last.start >= self.stop)
    }

    /// Trace `normalized` back to `chunk`, with what the normalizer put in front and without.
    fn origin<'a>(&self, chunk: &'a str, normalized: &str, base: usize) -> Result<Origin<'a>> {
        let probes = &self.tokenizer.probes;
        let prefix = if base == 0 { &probes.first } else { &probes.later };
        if !prefix.is_empty()
            && normalized.starts_with(prefix.as_str())
            && let Some(units) = self.units(chunk, normalized, prefix.len())?
        {
            return Ok(Origin::Units { chunk, units, cursor: 0 });
        }
        match self.units(chunk, normalized, 0)? {
            Some(units) => Ok(Origin::Units { chunk, units, cursor: 0 }),
            None => Err(Error::tokenizer(format!(
                "its normalizer changes {chunk:?} in a way that cannot be traced to characters; give no \"read\" spans"
            ))),
        }
    }

    /// Pair the stretches of `chunk` with their bytes in `normalized[from..]`, or `None` if they do not pair.
    fn units(&self, chunk: &str, normalized: &str, from: usize) -> Result<Option<Vec<Unit>>> {
        let probes = &self.tokenizer.probes;
        let mut units = Vec::new();
        if from > 0 {
            // What was put in front belongs to the first character, as in Python's alignments.
            let first = chunk.chars().next().map_or(0, char::len_utf8);
            units.push(Unit { start: 0, end: from, original: ByteSpan { start: 0, end: first }, same: false });
        }
        let (mut here, mut there) = (0, from);
        while here < chunk.len() {
            let (left, rest) = (&chunk[here..], &normalized[there..]);
            let equal = common_start(left, rest);
            let (taken, made) = if equal > 0 {
                (equal, equal)
            } else if left.starts_with(' ') && !probes.space.is_empty() && rest.starts_with(&probes.space) {
                (1, probes.space.len())
            } else {
                match self.grow_unit(left, rest)? {
                    Some(pair) => pair,
                    None => return Ok(None),
                }
            };
            let original = ByteSpan { start: here, end: here + taken };
            units.push(Unit { start: there, end: there + made, original, same: equal > 0 });
            here += taken;
            there += made;
        }
        Ok((there == normalized.len()).then_some(units))
    }

    /// The shortest run at the start of `chunk` whose normalization starts `rest`: its length and that of its image.
    fn grow_unit(&self, chunk: &str, rest: &str) -> Result<Option<(usize, usize)>> {
        for (at, character) in chunk.char_indices().take(LONGEST_UNIT) {
            let taken = at + character.len_utf8();
            let image = self.tokenizer.probes.unit(&self.tokenizer.engine, &chunk[..taken])?;
            if let Some(image) = image.filter(|image| rest.starts_with(image.as_str())) {
                return Ok(Some((taken, image.len())));
            }
        }
        Ok(None)
    }

    fn mismatch(&self, what: &str) -> Error {
        let at = self.spans.len();
        Error::tokenizer(format!(
            "the tokens do not spell their text: at token {at} of {} ({:?}) {what}; this tokenizer gives no spans for it",
            self.ids.len(),
            self.ids.get(at)
        ))
    }
}

fn at_boundary(text: &str, at: usize) -> usize {
    if text.is_char_boundary(at) {
        return at;
    }
    (0..at).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// How many bytes two texts have in common at their start, whole characters.
fn common_start(a: &str, b: &str) -> usize {
    let equal = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    at_boundary(a, equal)
}

/// The normalized bytes `start..end` come from `original`: byte for byte if they are the `same`, else as a whole.
#[derive(Debug)]
struct Unit {
    start: usize,
    end: usize,
    original: ByteSpan,
    same: bool,
}

/// A normalized stretch of a text and where its bytes come from.
struct Traced<'a> {
    normalized: &'a str,
    origin: Origin<'a>,
    base: usize,
}

impl Traced<'_> {
    fn original(&mut self, start: usize, end: usize) -> ByteSpan {
        self.origin.of(start, end).shifted(self.base)
    }
}

/// Where normalized bytes come from.
enum Origin<'a> {
    /// From the same place of this text.
    Same(&'a str),
    /// From these units of this text; tokens come in order, so the place of the last one is kept.
    Units { chunk: &'a str, units: Vec<Unit>, cursor: usize },
}

impl Origin<'_> {
    /// The original characters of the normalized bytes `start..end`, which is not empty.
    fn of(&mut self, start: usize, end: usize) -> ByteSpan {
        match self {
            Self::Same(text) => whole_characters(text, start, end),
            Self::Units { chunk, units, cursor } => {
                while units[*cursor].end <= start {
                    *cursor += 1;
                }
                let first = &units[*cursor];
                let last = units[*cursor..].iter().find(|unit| unit.end >= end).unwrap_or(first);
                let within = |unit: &Unit, at: usize, whole: usize| {
                    if unit.same { unit.original.start + at - unit.start } else { whole }
                };
                let start = within(first, start, first.original.start);
                whole_characters(chunk, start, within(last, end, last.original.end))
            }
        }
    }
}

/// The characters of which `start..end` covers any byte.
fn whole_characters(text: &str, start: usize, end: usize) -> ByteSpan {
    if text.is_char_boundary(start) && text.is_char_boundary(end) {
        return ByteSpan { start, end };
    }
    let end = (end..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    ByteSpan { start: at_boundary(text, start), end }
}
