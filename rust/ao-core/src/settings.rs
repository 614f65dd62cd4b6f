//! The settings of a writer and of its sources, from JSON to checked values.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::datapoint::{Common, LayersPerExample, Share, Source, SourceKind};
use crate::error::{Error, Result};
use crate::example::Positions;
use crate::lens::{Direction, LensSettings};

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
}

fn default_examples_per_shard() -> usize {
    8192
}

/// One source, as JSON. A recipe's entry may be handed over whole, so fields that only its reader needs are passed over.
#[derive(Debug, Deserialize)]
struct SourceSettings {
    name: String,
    kind: String,
    #[serde(default)]
    reads: Vec<ReadSettings>,
    single_share: Option<f64>,
    window: Option<[usize; 2]>,
    predict: Option<[usize; 2]>,
    direction: Option<String>,
    max_context_tokens: Option<usize>,
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

impl Source {
    /// Read a source's settings from JSON.
    ///
    /// # Errors
    /// If a field is unknown, missing for the kind or out of range.
    pub fn from_json(text: &str) -> Result<Self> {
        let settings: SourceSettings =
            serde_json::from_str(text).map_err(|error| Error::settings(format!("in a source: {error}")))?;
        let name = settings.name.clone();
        settings.resolve().map_err(|error| Error::settings(format!("source {name:?}: {error}")))
    }
}

impl SourceSettings {
    fn resolve(mut self) -> Result<Source> {
        let reads = std::mem::take(&mut self.reads).into_iter().map(ReadSettings::share).collect::<Result<Vec<_>>>()?;
        let total: f64 = reads.iter().map(|read| read.share).sum();
        if !reads.is_empty() && (total - 1.0).abs() > 1e-6 {
            return Err(Error::settings(format!("the shares in \"reads\" must add up to 1, got {total}")));
        }
        let name = Arc::from(self.name.as_str());
        let kind = match self.kind.as_str() {
            "records" => self.records()?,
            "context_prediction" => self.lens(!reads.is_empty())?,
            other => {
                return Err(Error::settings(format!(
                    "\"kind\" must be \"records\" or \"context_prediction\", got {other:?}"
                )));
            }
        };
        Ok(Source { name, kind, reads })
    }

    fn records(self) -> Result<SourceKind> {
        let lens_only = self.single_share.is_some()
            || self.window.is_some()
            || self.predict.is_some()
            || self.direction.is_some()
            || self.max_context_tokens.is_some();
        if lens_only {
            return Err(Error::settings(
                "\"single_share\", \"window\", \"predict\", \"direction\" and \"max_context_tokens\" are for the kind \"context_prediction\"",
            ));
        }
        Ok(SourceKind::Records)
    }

    fn lens(self, has_reads: bool) -> Result<SourceKind> {
        if has_reads {
            return Err(Error::settings("\"reads\" is not for the kind \"context_prediction\", which has \"window\""));
        }
        let settings = LensSettings {
            single_share: self.single_share.unwrap_or(0.5),
            window: self.window.unwrap_or([1, 50]),
            predict: self.predict.unwrap_or([1, 50]),
            direction: match self.direction.as_deref() {
                None | Some("both") => Direction::Both,
                Some("next") => Direction::Next,
                Some("previous") => Direction::Previous,
                Some(other) => {
                    return Err(Error::settings(format!(
                        "\"direction\" must be \"both\", \"next\" or \"previous\", got {other:?}"
                    )));
                }
            },
            max_context_tokens: self.max_context_tokens.unwrap_or(512),
        };
        for (name, [least, most]) in [("window", settings.window), ("predict", settings.predict)] {
            if least == 0 || least > most {
                return Err(Error::settings(format!(
                    "{name:?} must be [least, greatest] with 1 <= least <= greatest, got [{least}, {most}]"
                )));
            }
        }
        if !(0.0..=1.0).contains(&settings.single_share) {
            return Err(Error::settings(format!(
                "\"single_share\" must lie between 0 and 1, got {}",
                settings.single_share
            )));
        }
        Ok(SourceKind::ContextPrediction(settings))
    }
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
