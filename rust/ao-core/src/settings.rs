//! The settings of a writer and of its sources, from JSON to checked values.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::Value;

use crate::datapoint::{Common, LayersPerExample, Share, repeated};
use crate::error::{Error, Result};
use crate::example::Positions;
use crate::lens::{Direction, LensSettings};
use crate::source::{Classification, Documents, Kind, LatentQa, Source, Unanswerable};

/// The settings of a writer, as JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PackSettings {
    seed: u64,
    num_layers: usize,
    read_layers: Vec<usize>,
    layers_per_example: LayersPerExample,
    #[serde(default = "default_examples_per_shard")]
    pub(crate) examples_per_shard: usize,
    max_input_tokens: usize,
    max_context_tokens: usize,
    #[serde(default)]
    pub(crate) oracle: Value,
    #[serde(default)]
    pub(crate) targets: Value,
    #[serde(default)]
    pub(crate) config: Value,
    /// Digests of what is read, so that a build never goes on with other files.
    #[serde(default)]
    pub(crate) inputs: Value,
}

fn default_examples_per_shard() -> usize {
    8192
}

/// One source, as JSON.
#[derive(Debug, Deserialize)]
pub(crate) struct SourceSettings {
    name: String,
    #[serde(default)]
    seed: u64,
    count: Option<usize>,
    layers_per_example: Option<LayersPerExample>,
    #[serde(default)]
    reads: Vec<ReadSettings>,
    unanswerable: Option<UnanswerableSettings>,
    #[serde(flatten)]
    kind: KindSettings,
}

/// What belongs to one kind.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum KindSettings {
    Records {},
    ContextPrediction {
        #[serde(default = "default_text")]
        text: String,
        #[serde(default = "default_single_share")]
        single_share: f64,
        #[serde(default = "default_range")]
        window: [usize; 2],
        #[serde(default = "default_range")]
        predict: [usize; 2],
        #[serde(default)]
        direction: Direction,
        #[serde(default = "default_max_context_tokens")]
        max_context_tokens: usize,
        #[serde(default = "one")]
        draws_per_text: u32,
        #[serde(default)]
        within: Within,
    },
    Classification {
        #[serde(default = "default_text")]
        text: String,
        #[serde(default = "default_label")]
        label: String,
        questions: Vec<String>,
        #[serde(default)]
        labels: BTreeMap<String, Vec<String>>,
        #[serde(default)]
        prefix: String,
        #[serde(default = "one")]
        questions_per_text: u32,
        words: Option<Vec<String>>,
    },
    Latentqa {
        questions: HashMap<String, Vec<(String, String)>>,
        questions_per_stimulus: Option<usize>,
    },
}

/// What of a document is read and predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Within {
    #[default]
    All,
    Assistant,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnanswerableSettings {
    share: f64,
    answer: String,
}

fn default_text() -> String {
    "text".to_owned()
}

fn default_label() -> String {
    "label".to_owned()
}

fn default_single_share() -> f64 {
    0.5
}

fn default_range() -> [usize; 2] {
    [1, 50]
}

fn default_max_context_tokens() -> usize {
    512
}

fn one() -> u32 {
    1
}

/// One rule of a mixture, as JSON: a share, and `all`, `positions` or `window` with `before_end`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadSettings {
    share: f64,
    #[serde(default)]
    all: bool,
    window: Option<[usize; 2]>,
    before_end: Option<[usize; 2]>,
    positions: Option<Positions>,
}

impl ReadSettings {
    fn share(self) -> Result<Share> {
        if !(self.share.is_finite() && self.share > 0.0) {
            return Err(Error::settings(format!("\"share\" in \"reads\" must be above 0, got {}", self.share)));
        }
        let positions = match (self.all, self.window, self.before_end, self.positions) {
            (true, None, None, None) => Positions::All,
            (false, Some(window), before_end, None) => Positions::window(window, before_end.unwrap_or([0, 0]))?,
            (false, None, None, Some(positions)) => positions,
            _ => {
                return Err(Error::settings(
                    "each of \"reads\" needs one of \"all\": true, \"window\" (with \"before_end\") and \"positions\"",
                ));
            }
        };
        Ok(Share { share: self.share, positions })
    }
}

impl SourceSettings {
    /// Read a source's settings from JSON.
    ///
    /// # Errors
    /// If a field is unknown or missing for the kind.
    pub(crate) fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::settings(format!("in a source: {error}")))
    }

    /// The source, its values checked.
    ///
    /// # Errors
    /// If a value is out of range.
    pub(crate) fn resolve(self) -> Result<Source> {
        let name = self.name.clone();
        self.checked().map_err(|error| error.in_settings_of(&name))
    }

    fn checked(self) -> Result<Source> {
        let reads = self.reads.into_iter().map(ReadSettings::share).collect::<Result<Vec<_>>>()?;
        let total: f64 = reads.iter().map(|read| read.share).sum();
        if !reads.is_empty() && (total - 1.0).abs() > 1e-6 {
            return Err(Error::settings(format!("the shares in \"reads\" must add up to 1, got {total}")));
        }
        if self.count == Some(0) {
            return Err(Error::settings("\"count\" must be at least 1, got 0"));
        }
        let (kind, words) = self.kind.checked()?;
        let is_lens = matches!(kind, Kind::ContextPrediction(_));
        if is_lens && !reads.is_empty() {
            return Err(Error::settings("\"reads\" is not for the kind \"context_prediction\", which has \"window\""));
        }
        let unanswerable = self.unanswerable.map(|settings| settings.checked(is_lens)).transpose()?;
        Ok(Source::new(&self.name, self.seed, kind, reads).with(
            self.count,
            self.layers_per_example,
            unanswerable,
            words,
        ))
    }
}

impl UnanswerableSettings {
    fn checked(self, is_lens: bool) -> Result<Unanswerable> {
        if is_lens {
            return Err(Error::settings(
                "\"unanswerable\" is not for the kind \"context_prediction\": any context has tokens to predict",
            ));
        }
        if !(0.0..=1.0).contains(&self.share) {
            return Err(Error::settings(format!(
                "\"share\" in \"unanswerable\" must lie between 0 and 1, got {}",
                self.share
            )));
        }
        if self.answer.trim().is_empty() {
            return Err(Error::settings("\"answer\" in \"unanswerable\" is empty; say what an oracle should answer"));
        }
        Ok(Unanswerable { share: self.share, answer: self.answer })
    }
}

impl KindSettings {
    /// The kind, and the labels where they are given.
    fn checked(self) -> Result<(Kind, Option<Vec<String>>)> {
        let kind = match self {
            Self::Records {} => Kind::Records,
            Self::ContextPrediction {
                text,
                single_share,
                window,
                predict,
                direction,
                max_context_tokens,
                draws_per_text,
                within,
            } => {
                for (name, [least, most]) in [("window", window), ("predict", predict)] {
                    if least == 0 || least > most {
                        return Err(Error::settings(format!(
                            "{name:?} must be [least, greatest] with 1 <= least <= greatest, got [{least}, {most}]"
                        )));
                    }
                }
                if !(0.0..=1.0).contains(&single_share) {
                    return Err(Error::settings(format!(
                        "\"single_share\" must lie between 0 and 1, got {single_share}"
                    )));
                }
                at_least_one("draws_per_text", draws_per_text)?;
                let within_assistant = within == Within::Assistant;
                let lens =
                    LensSettings { single_share, window, predict, direction, max_context_tokens, within_assistant };
                Kind::ContextPrediction(Documents { text, draws_per_text, lens })
            }
            Self::Classification { text, label, questions, labels, prefix, questions_per_text, words } => {
                at_least_one("questions_per_text", questions_per_text)?;
                if questions.is_empty() {
                    return Err(Error::settings("\"questions\" is empty; give at least one template"));
                }
                let kind = Classification { text, label, questions, labels, prefix, questions_per_text };
                return Ok((Kind::Classification(kind), words));
            }
            Self::Latentqa { questions, questions_per_stimulus: per_stimulus } => {
                Kind::LatentQa(LatentQa { questions, per_stimulus })
            }
        };
        Ok((kind, None))
    }
}

fn at_least_one(name: &str, value: u32) -> Result<()> {
    if value == 0 {
        return Err(Error::settings(format!("{name:?} must be at least 1, got 0")));
    }
    Ok(())
}

impl PackSettings {
    /// What every example needs of the settings, checked.
    pub(crate) fn common(&self) -> Result<Common> {
        if self.read_layers.is_empty() {
            return Err(Error::settings("\"read_layers\" is empty; name at least one layer"));
        }
        if let Some(layer) = self.read_layers.iter().find(|&&layer| layer >= self.num_layers) {
            return Err(Error::settings(format!(
                "\"read_layers\" names layer {layer} of a model with {} layers",
                self.num_layers
            )));
        }
        if let Some(layer) = repeated(&self.read_layers) {
            return Err(Error::settings(format!("\"read_layers\" names layer {layer} twice; name each layer once")));
        }
        if self.num_layers > i16::MAX as usize {
            return Err(Error::settings(format!("\"num_layers\" is {}, at most {} fit", self.num_layers, i16::MAX)));
        }
        if self.examples_per_shard == 0 {
            return Err(Error::settings("\"examples_per_shard\" must be at least 1"));
        }
        Ok(Common {
            seed: self.seed,
            num_layers: self.num_layers,
            read_layers: self.read_layers.clone(),
            layers_per_example: self.layers_per_example,
            max_input_tokens: self.max_input_tokens,
            max_context_tokens: self.max_context_tokens,
        })
    }
}
