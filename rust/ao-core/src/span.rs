//! Ranges in bytes, code points and tokens, and the only place where one becomes another.
//!
//! Examples give code points, the tokenizer works on bytes, datapoints hold tokens. A range of the wrong unit is a
//! wrong label that nothing notices, so each unit has a type of its own and no arithmetic between them exists.

/// A range of bytes of a text, both ends on character boundaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteSpan {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A range of code points of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CharSpan {
    /// First code point.
    pub start: usize,
    /// One past the last code point.
    pub end: usize,
}

/// A range of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenSpan {
    /// First token.
    pub start: usize,
    /// One past the last token.
    pub end: usize,
}

impl ByteSpan {
    /// The same range in a text that has `by` bytes more in front.
    #[must_use]
    pub fn shifted(self, by: usize) -> Self {
        Self { start: self.start + by, end: self.end + by }
    }
}

/// The bytes of `span` in `text`, or `None` if it is reversed or ends outside the text. For many spans of one text there
/// is [`CharIndex`].
#[must_use]
pub fn char_bytes(text: &str, span: CharSpan) -> Option<ByteSpan> {
    if span.start > span.end {
        return None;
    }
    if text.is_ascii() {
        return (span.end <= text.len()).then_some(ByteSpan { start: span.start, end: span.end });
    }
    let mut starts = text.char_indices().map(|(at, _)| at).chain(std::iter::once(text.len()));
    let start = starts.nth(span.start)?;
    let end = if span.end == span.start { start } else { starts.nth(span.end - span.start - 1)? };
    Some(ByteSpan { start, end })
}

/// Where each code point of one text begins, to convert many spans of it.
#[derive(Debug)]
pub struct CharIndex {
    /// Byte offset of each code point, then the length of the text.
    starts: Vec<usize>,
}

impl CharIndex {
    /// Index `text`, in time proportional to its length.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        starts.push(text.len());
        Self { starts }
    }

    /// The number of code points.
    #[must_use]
    pub fn num_chars(&self) -> usize {
        self.starts.len() - 1
    }

    /// `span` in bytes, or `None` if it is reversed or ends outside the text.
    #[must_use]
    pub fn to_bytes(&self, span: CharSpan) -> Option<ByteSpan> {
        (span.start <= span.end && span.end <= self.num_chars())
            .then(|| ByteSpan { start: self.starts[span.start], end: self.starts[span.end] })
    }

    /// `span` in code points, or `None` if an end is not on a boundary of the text.
    #[must_use]
    pub fn to_chars(&self, span: ByteSpan) -> Option<CharSpan> {
        Some(CharSpan {
            start: self.starts.binary_search(&span.start).ok()?,
            end: self.starts.binary_search(&span.end).ok()?,
        })
    }
}

/// The tokens that share at least one byte with `wanted`.
///
/// `tokens` are the tokens' own bytes, in order. Several tokens may have the same span: a character that was split.
#[must_use]
pub fn overlapping(tokens: &[ByteSpan], wanted: ByteSpan) -> TokenSpan {
    let start = tokens.partition_point(|token| token.end <= wanted.start);
    let end = tokens.partition_point(|token| token.start < wanted.end);
    TokenSpan { start, end: end.max(start) }
}
