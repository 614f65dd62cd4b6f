//! Whether the engine gives the ids and the text that transformers' tokenizer gives.
//!
//! Asked of the tokenizer in hand, on texts that have gone wrong in one tokenizer or another, and on its own entries.

use serde_json::Value;

use crate::engine::Engine;
use crate::error::Result;
use crate::older::{Older, VERSION};
use crate::sample::Draws;

/// The engine's version, which `Cargo.toml` pins.
pub(crate) const ENGINE_VERSION: &str = "1.0.0-rc.3";

/// Texts in many scripts, with everything that has made tokenizers differ.
const TEXTS: [&str; 34] = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t\t",
    " \n \n",
    " leading and trailing ",
    "It's we'll THEY'RE I'M o'clock 'S ''",
    "0 12 345 6789 1,234.56 1e-9 \u{663}\u{664} \u{b2}\u{bd}",
    "def f(x):\n    return {\"a\": [x ** 2, None]}\n\n\n# end\n\t\tpass",
    "https://example.org/a?b=c&d=%20#e user@host.example",
    "Layer: 12\n ? ? ? ? \nIs it? ?? ?! \u{bf}?",
    "na\u{ef}ve caf\u{e9} cafe\u{301} \u{1e9e}\u{df} \u{fb01}n\u{212b}",
    "e\u{301}\u{323} a\u{308}\u{304} \u{301} x\u{300}\u{300}\u{300}\u{300}",
    "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442}, \u{43c}\u{438}\u{440}! \u{419}",
    "\u{3b3}\u{3b5}\u{3b9}\u{3ac} \u{3c3}\u{3bf}\u{3c5} \u{3ba}\u{3cc}\u{3c3}\u{3bc}\u{3b5}",
    "\u{645}\u{631}\u{62d}\u{628}\u{627} \u{628}\u{650}\u{633}\u{652}\u{645}\u{650}",
    "\u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{5e2}\u{5d5}\u{5b9}\u{5dc}\u{5b8}\u{5dd}",
    "\u{928}\u{92e}\u{938}\u{94d}\u{924}\u{947} \u{915}\u{94d}\u{937}\u{93c}",
    "\u{e2a}\u{e27}\u{e31}\u{e2a}\u{e14}\u{e35}\u{e0a}\u{e32}\u{e27}\u{e42}\u{e25}\u{e01}",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{3002}\u{300c}\u{5f15}\u{7528}\u{300d}",
    "\u{3053}\u{3093}\u{306b}\u{3061}\u{306f}\u{30ab}\u{3099}\u{ff76}\u{ff9e}",
    "\u{d55c}\u{ad6d}\u{c5b4} \u{1112}\u{1161}\u{11ab} \u{1100}\u{1161}",
    "\u{1f600}\u{1f44d}\u{1f3fd}\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467} \u{1f1e9}\u{1f1ea} \u{2764}\u{fe0f}",
    "\u{fffd} a\u{fffd}b \u{fffd}\u{fffd}",
    "\u{0} \u{1} \u{7f} \u{1c}\u{1d}\u{1e}\u{1f} \u{85}",
    "\u{a0}\u{2003}\u{3000}\u{200b}\u{feff}\u{2028}\u{2029} x\u{a0}y",
    "\u{2581} \u{2581}\u{2581}a \u{120}word \u{10a}\u{c4}\u{a0}",
    "<0x41><0xE2><unk><s></s> <pad>",
    "\u{1d4d0}\u{1d7d8} \u{20000}\u{2a6d6} \u{10ffff} \u{f0000} \u{e000}",
    "...!!! --- *** ___ ### ``` ~~~ \\\\ //",
    "\u{201c}quotes\u{201d} \u{2018}single\u{2019} \u{2013}\u{2014}\u{2026} \u{20ac}\u{a3}",
    "CamelCase snake_case SCREAMING_CASE mixed123abc 3D x86_64",
    "</think> <tool_response> [INST] <<SYS>> {{ x }} {% if %} <b>&amp;</b>",
];

/// How many of the tokenizer's own entries are asked about.
const ENTRIES: usize = 3000;
/// How many mixtures of everything.
const MIXTURES: usize = 400;

/// The probe texts for a tokenizer.
fn probes(root: &Value) -> Vec<String> {
    let mut texts: Vec<String> = TEXTS.map(str::to_owned).to_vec();
    texts.extend(
        [("x", 500), (" ", 300), ("\n", 200), ("?", 200), (" ?", 100), ("e\u{301}", 60), ("\u{4f60}", 120)]
            .map(|(unit, times)| unit.repeat(times)),
    );
    let added = root["added_tokens"].as_array().into_iter().flatten().filter_map(|token| token["content"].as_str());
    let added: Vec<&str> = added.collect();
    // Hundreds of reserved tokens are alike; the first and the last few are not.
    let shown = added.iter().take(64).chain(added.iter().skip(64.max(added.len().saturating_sub(64))));
    for token in shown {
        texts.extend([format!("a {token} b"), format!("a{token}b"), format!("  {token}{token}\n")]);
    }
    let mut draws = Draws::new(0, "tokenizer", "probes");
    let entries: Vec<&str> = match &root["model"]["vocab"] {
        Value::Object(vocabulary) => {
            let stride = vocabulary.len().div_ceil(ENTRIES).max(1);
            vocabulary.keys().step_by(stride).map(String::as_str).collect()
        }
        Value::Array(vocabulary) => {
            let stride = vocabulary.len().div_ceil(ENTRIES).max(1);
            vocabulary.iter().step_by(stride).filter_map(|entry| entry[0].as_str()).collect()
        }
        _ => Vec::new(),
    };
    // As they are written, and with the marks for spaces read as spaces.
    let plain = |entry: &str| entry.replace(['\u{2581}', '\u{120}'], " ").replace('\u{10a}', "\n");
    texts.extend(entries.chunks(12).map(<[&str]>::concat));
    texts.extend(entries.chunks(12).map(|chunk| chunk.iter().map(|entry| plain(entry)).collect::<String>()));
    texts.extend(entries.chunks(12).map(|chunk| chunk.join(" ")));
    let pool: Vec<&str> = TEXTS.iter().copied().chain(added.iter().copied().take(64)).collect();
    for _ in 0..MIXTURES {
        let mut text = String::new();
        for _ in 0..draws.between(1, 8) {
            let piece = pool[draws.below(pool.len() as u64) as usize];
            let from = draws.below(piece.chars().count() as u64 + 1) as usize;
            text.extend(piece.chars().skip(from).take(draws.between(1, 12)));
        }
        texts.push(text);
    }
    texts
}

/// What came of the comparison.
pub(crate) enum Proof {
    /// Equal on so many texts.
    Equal(usize),
    /// What differs, or what the engine refuses.
    Differs(String),
}

/// Compare the engine with transformers' tokenizer.
pub(crate) fn prove(engine: &Engine, older: &Older, root: &Value) -> Proof {
    let texts = probes(root);
    for text in &texts {
        let differs = |what: &str| Proof::Differs(format!("{what} {:?}", abridged(text)));
        let Ok(expected) = older.encode(text) else { continue };
        let ids = match engine.ids(text) {
            Ok(ids) => ids,
            Err(error) => return differs(&format!("it refuses ({error})")),
        };
        if ids != expected {
            return differs("it gives other ids for");
        }
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let decoded = |decoded: Result<String>| decoded.ok();
        if decoded(engine.decode(&ids)) != decoded(older.decode(&ids)) {
            return differs("it gives back other text for the ids of");
        }
    }
    Proof::Equal(texts.len())
}

/// What a summary says of an engine that was proved.
pub(crate) fn proved(count: usize) -> String {
    format!("tokenizers {ENGINE_VERSION}, equal to {VERSION} in ids and text on {count} probes")
}

fn abridged(text: &str) -> String {
    text.chars().take(60).collect()
}
