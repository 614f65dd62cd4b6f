//! Text to token ids and back, with the bytes that each token covers.
//!
//! The engine gives ids only. Spans are derived in `align` and proved there: the tokens' own bytes must spell the text.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use memchr::memmem;
use serde_json::{Value, json};

use crate::align::Probes;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::manifest::{canonical_json, sha256_hex};
use crate::older::{Older, Patterns, VERSION};
use crate::prove::{ENGINE_VERSION, Proof, prove, proved};

/// A tokenizer as one `tokenizer.json` describes it.
pub struct Tokenizer {
    pub(crate) backend: Backend,
    engine: String,
    added: HashMap<String, i32>,
    /// By id, up to the last added token: whether it is one, and whether it is special.
    roles: Vec<Role>,
    /// Whether the decoder only writes a space for U+2581 and a byte for each byte token.
    marks_spaces: bool,
    fingerprint: String,
}

/// What encodes and decodes.
pub(crate) enum Backend {
    /// The engine.
    Engine(Box<Own>),
    /// What it should have equalled, where it does not.
    Older(Box<Older>),
}

/// The engine and what is needed to trace its work.
pub(crate) struct Own {
    pub(crate) engine: Engine,
    pub(crate) surfaces: Surfaces,
    pub(crate) probes: Probes,
}

impl Own {
    /// Build from a canonical `tokenizer.json`.
    fn new(root: &Value) -> Result<Self> {
        let engine = Engine::from_canonical_json(root)?;
        let surfaces = Surfaces::new(&root["model"])?;
        let probes = Probes::new(&engine)?;
        Ok(Self { engine, surfaces, probes })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Entry,
    Added,
    Special,
}

impl Tokenizer {
    /// Read the text of a `tokenizer.json`, also one of an older format.
    ///
    /// # Errors
    /// If it is not one, or asks for a component that the engine does not have.
    pub fn from_json(text: &str) -> Result<Self> {
        let mut root: Value = serde_json::from_str(text).map_err(Error::tokenizer)?;
        if let Some(parts) = root.as_object_mut() {
            // They change while a tokenizer is in use, and nothing is cut or padded here.
            parts.remove("truncation");
            parts.remove("padding");
        }
        let fingerprint = sha256_hex(canonical_json(&root).as_bytes());
        require_dense_ids(&root)?;
        require_merges_in_bounds(&root["model"])?;
        let (backend, engine) = choose(&root)?;
        let mut added = HashMap::new();
        let mut roles = Vec::new();
        for token in root["added_tokens"].as_array().into_iter().flatten() {
            let (Some(content), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
                continue;
            };
            let id = i32::try_from(id).map_err(Error::tokenizer)?;
            added.insert(content.to_owned(), id);
            let at = id as usize;
            roles.resize(roles.len().max(at + 1), Role::Entry);
            roles[at] = if token["special"].as_bool() == Some(true) { Role::Special } else { Role::Added };
        }
        let marks_spaces = marks_spaces(&root["decoder"]);
        Ok(Self { backend, engine, added, roles, marks_spaces, fingerprint })
    }

    /// The sha256 of the file's content, whatever its layout; truncation and padding, which are not used, left out.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The ids of `text`. No special token is added around it; those in it are found.
    ///
    /// # Errors
    /// If the engine refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        match &self.backend {
            Backend::Engine(own) => unpanicked(|| own.engine.ids(text)),
            Backend::Older(older) => unpanicked(|| older.encode(text)),
        }
    }

    /// Which library encodes, and what was proved of it when it was chosen: for people.
    #[must_use]
    pub fn engine(&self) -> &str {
        &self.engine
    }

    /// The text of `ids`, special tokens included.
    ///
    /// # Errors
    /// If an id is negative or the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        if self.marks_spaces
            && !ids.iter().any(|&id| self.is_added(id))
            && let Backend::Engine(own) = &self.backend
            && let Some(text) = own.surfaces.marked_text(ids)
        {
            return Ok(text);
        }
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| u32::try_from(id).map_err(|_| Error::input(format!("{id} is not a token id"))))
            .collect::<Result<_>>()?;
        match &self.backend {
            Backend::Engine(own) => unpanicked(|| own.engine.decode(&ids)),
            Backend::Older(older) => unpanicked(|| older.decode(&ids)),
        }
    }

    /// The id of the added token that reads `content`.
    #[must_use]
    pub fn added_id(&self, content: &str) -> Option<i32> {
        self.added.get(content).copied()
    }

    /// Whether `id` is an added token that is marked special.
    #[must_use]
    pub fn is_special(&self, id: i32) -> bool {
        self.role(id) == Role::Special
    }

    fn is_added(&self, id: i32) -> bool {
        self.role(id) != Role::Entry
    }

    fn role(&self, id: i32) -> Role {
        usize::try_from(id).ok().and_then(|at| self.roles.get(at).copied()).unwrap_or_default()
    }
}

/// Ids are below this; the largest vocabularies have some 300,000.
const MOST_IDS: u64 = 1 << 24;

/// The engine if it equals transformers' tokenizer, else that one; and what to say of it.
fn choose(root: &Value) -> Result<(Backend, String)> {
    let own = || {
        unpanicked(|| {
            let mut canonical = root.clone();
            tokenizers::canonicalize_value(&mut canonical).map_err(Error::tokenizer)?;
            Own::new(&canonical)
        })
    };
    // They take about as long to read a large vocabulary.
    let (own, older) = rayon::join(own, || unpanicked(|| Older::new(root)));
    let (older, why) = match (own, older) {
        (Err(error), Err(_)) => return Err(error),
        (Err(error), Ok(older)) => (older, format!("it cannot be built ({error})")),
        (Ok(own), Err(error)) => {
            let engine = format!("tokenizers {ENGINE_VERSION}, not compared: {VERSION} cannot read the file ({error})");
            return Ok((Backend::Engine(Box::new(own)), engine));
        }
        (Ok(own), Ok(older)) => match unpanicked(|| Ok(prove(&own.engine, &older, root))) {
            Ok(Proof::Equal(count)) => return Ok((Backend::Engine(Box::new(own)), proved(count))),
            Ok(Proof::Differs(what)) => (older, what),
            Err(error) => (older, error.to_string()),
        },
    };
    let patterns = Patterns::of(&root["pre_tokenizer"])?;
    let engine = format!("tokenizers {VERSION}, because of {ENGINE_VERSION}: {why}");
    Ok((Backend::Older(Box::new(older.watched(patterns))), engine))
}

/// What `work` gives, or an error if it panics, which neither library should do and either may on a file that is no
/// tokenizer of any model.
fn unpanicked<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::tokenizer("it makes the tokenizer library panic; report the file to its authors"))
    })
}

/// U+2581 in UTF-8.
const SPACE_BYTES: &[u8] = "\u{2581}".as_bytes();

/// Whether a decoder is the one that Gemma's tokenizers have.
fn marks_spaces(decoder: &Value) -> bool {
    let replace = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
    *decoder == json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]})
}

/// The bytes of each vocabulary entry as they stand in normalized text.
#[derive(Debug)]
pub(crate) struct Surfaces {
    ends: Vec<usize>,
    bytes: Vec<u8>,
    /// The byte that an id stands for where the model falls back to bytes.
    fallback: HashMap<i32, u8>,
    /// The ids between which those lie, to pass the others by quickly.
    fallback_ids: RangeInclusive<i32>,
    /// The id that stands for one character that the model does not know.
    unknown: Option<i32>,
    /// Why no spans can be told, where that is so.
    pub(crate) refused: Option<String>,
}

impl Surfaces {
    fn new(model: &Value) -> Result<Self> {
        let byte_level = model["byte_level"].as_bool() == Some(true);
        let mut entries = vocabulary(model)?;
        entries.sort_unstable_by_key(|&(_, id)| id);
        let decode = byte_level.then(byte_level_alphabet);
        let mut surfaces = Self {
            ends: Vec::with_capacity(entries.len()),
            bytes: Vec::new(),
            fallback: HashMap::new(),
            fallback_ids: -1..=-1,
            unknown: unknown(model),
            refused: refusal(model),
        };
        for (token, id) in entries {
            surfaces.ends.resize(id, surfaces.bytes.len());
            match &decode {
                Some(alphabet) => {
                    surfaces.bytes.extend(token.chars().filter_map(|character| alphabet.get(&character).copied()));
                }
                None => surfaces.bytes.extend_from_slice(token.as_bytes()),
            }
            surfaces.ends.push(surfaces.bytes.len());
            if model["byte_fallback"].as_bool() == Some(true)
                && let Some(byte) = fallback_byte(token)
            {
                surfaces.fallback.insert(id as i32, byte);
            }
        }
        if let (Some(&first), Some(&last)) = (surfaces.fallback.keys().min(), surfaces.fallback.keys().max()) {
            surfaces.fallback_ids = first..=last;
        }
        Ok(surfaces)
    }

    /// The bytes of `id`, empty where it is not in the model's vocabulary.
    fn of(&self, id: i32) -> &[u8] {
        let Ok(at) = usize::try_from(id) else { return &[] };
        let Some(&end) = self.ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start..end]
    }

    /// The same as [`Surfaces::length_at`], for a text with spaces where the entries have U+2581, and without that one.
    pub(crate) fn marked_length_at(&self, id: i32, text: &str, at: usize) -> Option<usize> {
        let rest = &text.as_bytes()[at..];
        if self.fallback_ids.contains(&id) && self.fallback.get(&id) == rest.first() {
            return Some(1);
        }
        if self.unknown == Some(id) {
            return text.get(at..)?.chars().next().map(char::len_utf8);
        }
        let (mut surface, mut length) = (self.of(id), 0);
        while !surface.is_empty() {
            if let Some(behind) = surface.strip_prefix(SPACE_BYTES) {
                if rest.get(length) != Some(&b' ') {
                    return None;
                }
                (surface, length) = (behind, length + 1);
                continue;
            }
            let plain = memmem::find(surface, SPACE_BYTES).unwrap_or(surface.len());
            if !rest[length..].starts_with(&surface[..plain]) {
                return None;
            }
            (surface, length) = (&surface[plain..], length + plain);
        }
        (length > 0).then_some(length)
    }

    /// The text of `ids` with spaces for U+2581, or `None` if there is more to one of them than its entry.
    fn marked_text(&self, ids: &[i32]) -> Option<String> {
        let mut text = Vec::with_capacity(ids.len() * 6);
        for &id in ids {
            let mut surface = self.of(id);
            if surface.is_empty() || self.fallback_ids.contains(&id) && self.fallback.contains_key(&id) {
                return None;
            }
            while let Some(at) = memmem::find(surface, SPACE_BYTES) {
                text.extend_from_slice(&surface[..at]);
                text.push(b' ');
                surface = &surface[at + SPACE_BYTES.len()..];
            }
            text.extend_from_slice(surface);
        }
        String::from_utf8(text).ok()
    }

    /// How many bytes of `text` from byte `at` the token `id` spells, or `None` if it does not.
    pub(crate) fn length_at(&self, id: i32, text: &str, at: usize) -> Option<usize> {
        let rest = &text.as_bytes()[at..];
        if self.fallback_ids.contains(&id) && self.fallback.get(&id) == rest.first() {
            return Some(1);
        }
        if self.unknown == Some(id) {
            return text.get(at..)?.chars().next().map(char::len_utf8);
        }
        let surface = self.of(id);
        (!surface.is_empty() && rest.starts_with(surface)).then_some(surface.len())
    }
}

/// Refuse ids far out, before tables by id are made: the engine's own are as long as the greatest id says.
fn require_dense_ids(root: &Value) -> Result<()> {
    let entries = root["model"]["vocab"].as_object().into_iter().flatten();
    let added = root["added_tokens"].as_array().into_iter().flatten();
    let ids = entries.map(|(token, id)| (token.as_str(), id));
    let added = added.map(|token| (token["content"].as_str().unwrap_or_default(), &token["id"]));
    match ids.chain(added).find(|(_, id)| !id.is_null() && id.as_u64().is_none_or(|id| id >= MOST_IDS)) {
        None => Ok(()),
        Some((token, id)) => Err(Error::tokenizer(format!(
            "the id of {token:?} is {id}, but ids must be whole numbers below {MOST_IDS}; the file is damaged"
        ))),
    }
}

/// Refuse merges that give more than any entry has room for, on which the engine would panic.
fn require_merges_in_bounds(model: &Value) -> Result<()> {
    let (Some(merges), Some(vocab)) = (model["merges"].as_array(), model["vocab"].as_object()) else { return Ok(()) };
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for merge in merges {
        let parts = match merge {
            Value::String(text) => text.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        let Some((left, right)) = parts else { continue };
        if right.strip_prefix(prefix).is_none_or(|right| left.len() + right.len() > longest) {
            return Err(Error::tokenizer(format!(
                "the merge of {left:?} and {right:?} gives no entry of the vocabulary; the file is damaged"
            )));
        }
    }
    Ok(())
}

/// The model's entries: a map of ids, or for Unigram a list whose order is the ids.
fn vocabulary(model: &Value) -> Result<Vec<(&str, usize)>> {
    match &model["vocab"] {
        Value::Object(map) => map
            .iter()
            .map(|(token, id)| Some((token.as_str(), usize::try_from(id.as_u64()?).ok()?)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::tokenizer("an id of the vocabulary is not a whole number")),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(id, item)| Some((item[0].as_str()?, id)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::tokenizer("an entry of the vocabulary is not [token, score]")),
        _ => Err(Error::tokenizer("the model has no vocabulary")),
    }
}

/// Models whose entries do not stand in the text as they are written.
fn refusal(model: &Value) -> Option<String> {
    let marked = |key: &str| model[key].as_str().is_some_and(|mark| !mark.is_empty());
    (marked("continuing_subword_prefix") || marked("end_of_word_suffix")).then(|| {
        "its entries carry a word-piece mark, for which this version has no token spans; give no \"read\" spans"
            .to_owned()
    })
}

/// The unknown token, where it stands for one character each; fused ones cover a run whose end cannot be told.
fn unknown(model: &Value) -> Option<i32> {
    if model["type"] != "BPE" || model["fuse_unk"] == true {
        return None;
    }
    model["vocab"][model["unk_token"].as_str()?].as_i64().map(|id| id as i32)
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The printable characters that byte-level vocabularies write bytes with: printable Latin-1 as itself, the rest
/// numbered from U+0100.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|byte| {
            let itself = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if itself { u32::from(byte) } else { next };
            next += u32::from(!itself);
            (char::from_u32(code).expect("below the surrogates"), byte)
        })
        .collect()
}
