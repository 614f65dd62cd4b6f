//! One example as its author wrote it: a JSON object, refused where a field is unknown or has the wrong shape.

use std::fmt;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`, or whatever else the chat template knows.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

/// The text that the target reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Context {
    /// Raw text, behind the tokenizer's beginning-of-sequence token where it has one.
    Text(String),
    /// A conversation, rendered with the chat template.
    Messages(Vec<Message>),
}

impl<'de> Deserialize<'de> for Context {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> de::Visitor<'de> for Either {
            type Value = Context;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a string or a list of {\"role\", \"content\"} as \"context\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Context, E> {
                Ok(Context::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Context, E> {
                Ok(Context::Text(text))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Context, A::Error> {
                let mut messages = Vec::new();
                while let Some(message) = items.next_element::<Message>()? {
                    messages.push(message);
                }
                Ok(Context::Messages(messages))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// One stretch of a context that may be read, in code points.
///
/// Of a text `start` and `end`; of a message both, or neither for the whole turn with its markup, or `onwards` for
/// everything from the turn's header to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Read {
    /// Which message; left out for a text.
    pub message: Option<usize>,
    /// First code point.
    pub start: Option<usize>,
    /// One past the last code point.
    pub end: Option<usize>,
    /// From the header of `message` to the end of the rendered text.
    #[serde(default)]
    pub onwards: bool,
}

/// Which of the readable tokens are read. Index 0 is the first readable token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// Every readable token.
    All,
    /// These, in this order; negative ones count from the end.
    Listed(Vec<i64>),
    /// A run whose length is uniform in `window` and whose last token stands `before_end` tokens before the last
    /// readable one, uniform too; both clipped to what is there.
    Window {
        /// Least and greatest number of tokens.
        window: [usize; 2],
        /// Least and greatest distance to the last readable token; 0 is that token.
        before_end: [usize; 2],
    },
}

/// The window form, on its own so that unknown fields are refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowRule {
    window: [usize; 2],
    #[serde(default)]
    before_end: [usize; 2],
}

impl Positions {
    /// A window rule whose bounds make sense.
    pub(crate) fn window(window: [usize; 2], before_end: [usize; 2]) -> Result<Self> {
        if window[0] == 0 || window[0] > window[1] {
            return Err(Error::input(format!(
                "\"window\" must be [least, greatest] with 1 <= least <= greatest, got {window:?}"
            )));
        }
        if before_end[0] > before_end[1] {
            return Err(Error::input(format!(
                "\"before_end\" must be [least, greatest] with least <= greatest, got {before_end:?}"
            )));
        }
        Ok(Self::Window { window, before_end })
    }
}

impl<'de> Deserialize<'de> for Positions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(word) if word == "all" => Ok(Self::All),
            list @ Value::Array(_) => Vec::<i64>::deserialize(list)
                .map(Self::Listed)
                .map_err(|error| de::Error::custom(format!("in \"positions\": {error}"))),
            object @ Value::Object(_) => WindowRule::deserialize(object)
                .map_err(|error| error.to_string())
                .and_then(|rule| Self::window(rule.window, rule.before_end).map_err(|error| error.to_string()))
                .map_err(|error| de::Error::custom(format!("in \"positions\": {error}"))),
            _ => Err(de::Error::custom(
                "\"positions\" must be \"all\", a list of whole numbers or {\"window\", \"before_end\"}",
            )),
        }
    }
}

/// A layer: an index, or a depth between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layer {
    /// The output of this block, counted from 0.
    Index(i64),
    /// This share of the depth.
    Depth(f64),
}

impl<'de> Deserialize<'de> for Layer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if let Some(index) = value.as_i64() {
            return Ok(Self::Index(index));
        }
        value
            .as_f64()
            .map(Self::Depth)
            .ok_or_else(|| de::Error::custom("\"layers\" must hold whole numbers (indices) or fractions (depths)"))
    }
}

impl Layer {
    /// The index of this layer in a model of `num_layers` blocks.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn resolve(self, num_layers: usize) -> Result<usize> {
        let index = match self {
            Self::Index(index) => index,
            // Rounding first keeps 0.29 from becoming 28 percent; the same formula as in the reference and in Python.
            Self::Depth(depth) => {
                let percent: f64 = format!("{:.6}", 100.0 * depth)
                    .parse()
                    .map_err(|_| Error::input(format!("the depth {depth} is not a number")))?;
                (num_layers as f64 * percent / 100.0) as i64
            }
        };
        usize::try_from(index).ok().filter(|&index| index < num_layers).ok_or_else(|| {
            let what = format!(
                "layer {index} is out of range: the model has layers 0 to {}; give one of them, or a depth from 0 to \
                     below 1",
                num_layers.saturating_sub(1)
            );
            Error::value("layer_out_of_range", what)
        })
    }
}

/// Whose activations are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The base model's.
    #[default]
    Base,
    /// The tuned model's.
    Adapter,
    /// The tuned model's minus the base model's.
    Difference,
}

impl Kind {
    /// As it stands in a shard.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// One example, as one line of JSON has it.
///
/// `question` and `answer` are missing only in a source of kind `context_prediction`, which makes them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// Unique in the data set; every random draw is keyed by it.
    pub id: String,
    /// The source's name, where the example says it.
    pub source: Option<String>,
    /// What the target reads.
    pub context: Context,
    /// What of it may be read; everything if left out.
    pub read: Option<Vec<Read>>,
    /// What the oracle is asked.
    pub question: Option<String>,
    /// What it should say.
    pub answer: Option<String>,
    /// Which of the readable tokens are read; the source's mixture if left out.
    pub positions: Option<Positions>,
    /// Which layers are read; the settings' if left out.
    pub layers: Option<Vec<Layer>>,
    /// Whose activations are read.
    #[serde(default)]
    pub target: Kind,
    /// Anything else, kept as it is.
    #[serde(default)]
    pub meta: serde_json::Map<String, Value>,
}
