//! What fuzzing found, and short runs of the same checks on mutated sound inputs. `make soak` fuzzes in earnest.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cases;
#[path = "../fuzz/checks.rs"]
mod checks;

use ao_core::example::Message;
use ao_core::locate::Located;
use ao_core::template::Template;
use ao_core::tokenize::Tokenizer;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, json};

type Check = fn(&[u8]);

const TARGETS: [(&str, Check); 6] = [
    ("jsonl", checks::jsonl),
    ("template", checks::template),
    ("tokenizer_json", checks::tokenizer_json),
    ("shard", checks::shard),
    ("manifest", checks::manifest),
    ("activations", checks::activations),
];

/// Words at which readers stumble.
const WORDS: [&str; 24] = [
    "0",
    "-1",
    "1",
    "9223372036854775807",
    "18446744073709551615",
    "-9223372036854775808",
    "1e308",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "[[[[",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "\u{feff}",
    "\u{ff6fe}",
    "\n",
    "\"id\":",
    "{{ ",
    " }}",
    "{%- ",
    "<|im_end|>",
];

/// One change of a sound input.
#[derive(Debug, Clone)]
enum Change {
    Byte(Index, u8),
    Cut(Index, Index),
    Repeat(Index, Index),
    Word(Index, usize),
    Number(Index, usize),
}

impl Change {
    fn apply(&self, data: &mut Vec<u8>) {
        if data.is_empty() {
            return;
        }
        let stretch = |data: &[u8], at: &Index, length: &Index| {
            let at = at.index(data.len());
            at..(at + 1 + length.index(64)).min(data.len())
        };
        match self {
            Self::Byte(at, to) => {
                let at = at.index(data.len());
                data[at] = *to;
            }
            Self::Cut(at, length) => drop(data.drain(stretch(data, at, length))),
            Self::Repeat(at, length) => {
                let range = stretch(data, at, length);
                let piece = data[range.clone()].to_vec();
                data.splice(range.start..range.start, piece);
            }
            Self::Word(at, word) => {
                let at = at.index(data.len());
                data.splice(at..at, WORDS[*word].bytes());
            }
            Self::Number(at, word) => {
                let digits: Vec<usize> = (0..data.len()).filter(|&at| data[at].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    let at = digits[at.index(digits.len())];
                    data.splice(at..=at, WORDS[*word].bytes());
                }
            }
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, to)| Change::Byte(at, to)),
        (at(), at()).prop_map(|(at, length)| Change::Cut(at, length)),
        (at(), at()).prop_map(|(at, length)| Change::Repeat(at, length)),
        (at(), 0..WORDS.len()).prop_map(|(at, word)| Change::Word(at, word)),
        (at(), 0..WORDS.len()).prop_map(|(at, word)| Change::Number(at, word)),
    ]
}

/// Shown as text.
struct Input(Vec<u8>);

impl std::fmt::Debug for Input {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "b\"{}\"", self.0.escape_ascii())
    }
}

fn mutated(target: &str) -> impl Strategy<Value = Input> + use<> {
    let changes = prop::collection::vec(change(), 0..6);
    (prop::sample::select(checks::seeds(target)), changes).prop_map(|(mut data, changes)| {
        for change in changes {
            change.apply(&mut data);
        }
        Input(data)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..cases::cases(64) })]

    #[test]
    fn any_rows(data in mutated("jsonl")) { checks::jsonl(&data.0) }

    #[test]
    fn any_template(data in mutated("template")) { checks::template(&data.0) }

    #[test]
    fn any_tokenizer(data in mutated("tokenizer_json")) { checks::tokenizer_json(&data.0) }

    #[test]
    fn any_shard(data in mutated("shard")) { checks::shard(&data.0) }

    #[test]
    fn any_parts(data in mutated("manifest")) { checks::manifest(&data.0) }

    #[test]
    fn any_activations(data in mutated("activations")) { checks::activations(&data.0) }
}

/// A row may name any numbers: these were added up beyond 64 bits.
#[test]
fn numbers_at_the_end_of_their_range() {
    let greatest = u64::MAX;
    for rule in [
        json!({"window": [1, greatest], "before_end": [0, greatest]}),
        json!({"window": [greatest, greatest]}),
        json!([i64::MIN, i64::MAX]),
    ] {
        let row = json!({"id": "a", "context": "a b c d", "question": "q", "answer": "a", "positions": rule});
        checks::jsonl(&[b"\0", row.to_string().as_bytes()].concat());
    }
    let read =
        json!([{"start": 0, "end": greatest}, {"start": greatest, "end": 0}, {"start": greatest, "end": greatest}]);
    for read in read.as_array().unwrap() {
        let row = json!({"id": "a", "context": "a b \u{e9}", "question": "q", "answer": "a", "read": [read]});
        checks::jsonl(&[b"\0", row.to_string().as_bytes()].concat());
    }
}

/// Contents were placed by a function that called itself for the next one.
#[test]
fn a_conversation_of_very_many_turns() {
    let template =
        Template::new("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", &Map::new(), "2025-01-01")
            .unwrap();
    let turn = |content: &str| Message { role: "user".to_owned(), content: content.to_owned() };
    let messages: Vec<Message> = (0..20_000).map(|at| turn([" x", "\n", "><"][at % 3])).collect();
    let text = template.render(&messages, false).unwrap();
    let located = Located::new(&template, &messages, false, &text).unwrap();
    let shown: Vec<&str> = located.contents.iter().map(|span| &text[span.start..span.end]).collect();
    assert_eq!((shown.len(), &shown[..4]), (20_000, &["x", "", "><", "x"][..]));
    // Where nothing stands between contents of white space, most ways of placing them are in vain.
    let template =
        Template::new("{% for m in messages %}{{ m.content }}{% endfor %}", &Map::new(), "2025-01-01").unwrap();
    let messages: Vec<Message> = (0..60).map(|_| turn(" \n ")).collect();
    let text = template.render(&messages, false).unwrap();
    assert!(Located::new(&template, &messages, false, &text).is_ok());
    assert!(Located::new(&template, &messages, false, &format!("{text}x")).is_err());
}

/// What a template costs is bounded: its steps, and the white space that it asks for.
#[test]
fn a_template_that_would_not_end() {
    for template in [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ {'a': 1} | tojson(indent=1000000000000) }}",
        "{{ [[[[[1]]]]] | tojson(indent=18446744073709551615) }}",
    ] {
        let template = Template::new(template, &Map::new(), "2025-01-01").unwrap();
        assert!(template.render(&[], true).is_err());
    }
    assert!(Template::new("", &Map::new(), "0000-01-01").is_err(), "there is no year 0");
}

/// The tag was thought to end inside its own opening mark.
#[test]
fn a_tag_that_is_only_its_marks() {
    for template in
        ["{%}", "{%}%}", "{%}{% generation %}", "{%", "{%-%}", "{%--%}", "{% generation -%}x{%- endgeneration %}"]
    {
        checks::template(format!("{template}\0ua").as_bytes());
    }
}

/// Tables by id were made as long as the greatest id says.
#[test]
fn a_tokenizer_with_an_id_far_out() {
    for (field, id) in [
        ("\"<s>\":6", "4294967295"),
        ("\"id\":6", "2147483647"),
        ("\"ab\":3", "18446744073709551615"),
        ("\"ab\":3", "1e9"),
        ("\"ab\":3", "-1"),
    ] {
        let text = String::from_utf8(checks::seeds("tokenizer_json").pop().unwrap()).unwrap();
        assert!(text.contains(field));
        Tokenizer::from_json(&text).map(drop).unwrap();
        let (name, _) = field.split_at(field.len() - 1);
        assert!(Tokenizer::from_json(&text.replace(field, &format!("{name}{id}"))).is_err());
    }
}

/// The engine panics on merges that give more than the longest entry, or that lack the prefix of what continues a word.
#[test]
fn a_tokenizer_with_merges_of_no_entry() {
    let text = String::from_utf8(checks::seeds("tokenizer_json").pop().unwrap()).unwrap();
    let prefix = "\"continuing_subword_prefix\":null";
    for (field, other) in [
        ("\"ab\":3", "\"d\":3"),
        (prefix, "\"continuing_subword_prefix\":\"####\""),
        ("[\"a\",\"b\"]", "[\"\u{2581}a\",\"\u{2581}a\"]"),
        ("[\"a\",\"b\"]", "\"\u{2581}a \u{2581}a\""),
    ] {
        let mut text = text.replace(field, other);
        assert!(text.contains(other));
        if other.contains("\"d\"") {
            text = text.replace("\"\u{2581}a\":4", "\"e\":4");
        }
        assert!(Tokenizer::from_json(&text).is_err());
    }
}

/// A list of all its shards was made as long as a part's file says.
#[test]
fn parts_that_count_more_shards_than_there_are() {
    let parts = String::from_utf8(checks::seeds("manifest").pop().unwrap()).unwrap();
    assert!(parts.contains("\"num_shards\":3"));
    for count in ["1000000000000", "18446744073709551615", "0", "2"] {
        checks::manifest(parts.replace("\"num_shards\":3", &format!("\"num_shards\":{count}")).as_bytes());
    }
}

/// Memory was asked for by what an index says of its rows, and its rows of values were multiplied beyond 64 bits.
#[test]
fn an_index_of_more_rows_than_there_are() {
    let index = String::from_utf8_lossy(&checks::seeds("activations")[1]).into_owned();
    assert!(index.contains("\\\"rows\\\":{\\\"3\\\":7,") && index.contains("\\\"width\\\":5,"));
    for (field, others) in [
        (":7,", ["2305843009213693952", "4611686018427387904", "18446744073709551615", "-1"]),
        (":5,", ["9223372036854775808", "18446744073709551615", "0", "1e9"]),
    ] {
        for other in others {
            let seed = &checks::seeds("activations")[1];
            // The header's length, in front of it, has to grow by as much.
            let header = u64::from_le_bytes(seed[1..9].try_into().unwrap()) as usize;
            let text = String::from_utf8(seed[9..9 + header].to_vec()).unwrap();
            let text = text.replacen(field, &format!(":{other},"), 1);
            checks::activations(
                &[&[1][..], &(text.len() as u64).to_le_bytes(), text.as_bytes(), &seed[9 + header..]].concat(),
            );
        }
    }
}

/// Nothing but its shards was looked at.
#[test]
fn a_manifest_that_is_no_json() {
    let parts = checks::seeds("manifest").pop().unwrap();
    let second = String::from_utf8(parts.split(|&byte| byte == 0).nth(1).unwrap().to_vec()).unwrap();
    for build in ["\\ud800", "\\u12", "\n"] {
        let manifest = second.replacen("\"build\":\"", &format!("\"build\":\"{build}"), 1);
        checks::manifest(&[parts.as_slice(), manifest.as_bytes()].concat());
    }
}

/// Seeds of the fuzz targets, written where `AO_FUZZ_SEEDS` says.
#[test]
fn seeds_pass_their_own_checks() {
    for (target, check) in TARGETS {
        for (number, seed) in checks::seeds(target).iter().enumerate() {
            check(seed);
            if let Some(folder) = std::env::var_os("AO_FUZZ_SEEDS") {
                let folder = std::path::Path::new(&folder).join(target);
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(folder.join(format!("seed-{number}")), seed).unwrap();
            }
        }
    }
}
