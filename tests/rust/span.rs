//! Spans: units convert both ways, and tokens cover what they say.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cases;
mod common;

use ao_core::frame::Framer;
use ao_core::span::{ByteSpan, CharIndex, CharSpan, overlapping};
use proptest::prelude::*;

/// Text with everything that makes bytes, characters and tokens differ.
fn odd_text() -> impl Strategy<Value = String> {
    let pieces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "a",
        "?",
        " ?",
        "e\u{301}",
        "\u{301}",
        "\u{e9}",
        "\u{1f600}",
        "\u{1f468}\u{200d}\u{1f469}",
        "\u{4f60}\u{597d}",
        "\u{2581}",
        "<bos>",
        "<|turn>",
        "<turn|>",
        "<note>",
        "<|im_end|>",
        "<0x41>",
        "\u{fffd}",
        "\u{0}",
        "\t",
        "weather",
        "user",
        "0123",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..24).prop_map(|pieces| pieces.concat())
}

fn check_tokens(framer: &Framer, text: &str) {
    let tokenizer = framer.tokenizer();
    let ids = tokenizer.encode(text).unwrap();
    let spans = tokenizer.spans(text, &ids).unwrap();
    assert_eq!(spans.len(), ids.len());
    assert!(spans.is_sorted_by_key(|span| span.start) && spans.is_sorted_by_key(|span| span.end));
    let mut covered = vec![false; text.len()];
    for span in &spans {
        assert!(text.get(span.start..span.end).is_some(), "{span:?} cuts a character of {text:?}");
        covered[span.start..span.end].fill(true);
    }
    assert!(covered.iter().all(|&covered| covered), "{text:?} is not covered by {spans:?}");
}

proptest! {
    #![proptest_config(cases::cases(128))]

    #[test]
    fn units_convert_both_ways(text in "\\PC{0,40}", start in 0usize..45, length in 0usize..45) {
        let index = CharIndex::new(&text);
        let span = CharSpan { start, end: start + length };
        match index.to_bytes(span) {
            Some(bytes) => {
                let sliced: String = text.chars().skip(start).take(length).collect();
                prop_assert_eq!(&text[bytes.start..bytes.end], sliced);
                prop_assert_eq!(index.to_chars(bytes), Some(span));
            }
            None => prop_assert!(span.end > text.chars().count()),
        }
    }

    #[test]
    fn overlap_is_what_counting_bytes_says(
        lengths in prop::collection::vec(1usize..5, 1..12), start in 0usize..50, length in 1usize..20,
    ) {
        let mut end = 0;
        let tokens: Vec<ByteSpan> = lengths.iter().map(|length| {
            let start = end;
            end += length;
            ByteSpan { start, end }
        }).collect();
        let wanted = ByteSpan { start, end: start + length };
        let found = overlapping(&tokens, wanted);
        for (at, token) in tokens.iter().enumerate() {
            let shares = (token.start..token.end).any(|byte| (wanted.start..wanted.end).contains(&byte));
            prop_assert_eq!(shares, (found.start..found.end).contains(&at));
        }
    }
}

#[test]
fn tokens_cover_odd_texts() {
    let framers = [common::gemma(), common::qwen()];
    proptest!(cases::cases(256), |(text in odd_text())| {
        for framer in &framers {
            check_tokens(framer, &text);
        }
    });
}

#[test]
fn tokens_of_one_character_have_its_span() {
    for framer in [common::gemma(), common::qwen()] {
        let ids = framer.tokenizer().encode("\u{1f600}").unwrap();
        let spans = framer.tokenizer().spans("\u{1f600}", &ids).unwrap();
        assert_eq!(ids.len(), 4);
        assert!(spans.iter().all(|span| *span == ByteSpan { start: 0, end: 4 }));
    }
}

#[test]
fn a_composed_character_covers_all_that_it_was_made_of() {
    let framer = common::qwen();
    let ids = framer.tokenizer().encode("e\u{301}x").unwrap();
    let spans = framer.tokenizer().spans("e\u{301}x", &ids).unwrap();
    assert_eq!(spans[0], ByteSpan { start: 0, end: 3 });
    assert_eq!(spans[spans.len() - 1], ByteSpan { start: 3, end: 4 });
}

#[test]
fn ids_that_do_not_spell_the_text_are_refused() {
    let framer = common::gemma();
    let ids = framer.tokenizer().encode("weather").unwrap();
    for (text, what) in [("whether", "do not spell"), ("weather today", "end before"), ("weath", "do not spell")] {
        let error = framer.tokenizer().spans(text, &ids).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}
