//! From an example to datapoints: which positions, which layers, which tokens.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::example::{Kind, Layer, Positions};
use crate::frame::Framer;
use crate::manifest::canonical_json;
use crate::sample::Draws;
use crate::source::strip;

/// One unit of training: an oracle prompt with its answer, and where its placeholders get their vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Datapoint {
    /// The example's id, with `@L` and the layer behind it where an example makes one datapoint per layer.
    pub id: String,
    /// The source's name.
    pub source: Arc<str>,
    /// Prompt, answer, end of turn.
    pub input_ids: Vec<i32>,
    /// Index into `input_ids` of the first answer token.
    pub answer_start: i32,
    /// Indices into `input_ids`, layer by layer.
    pub placeholders: Vec<i32>,
    /// For each placeholder, the layer.
    pub layers: Vec<i16>,
    /// For each placeholder, the index into `context_ids`.
    pub read_positions: Vec<i32>,
    /// What the target reads, cut after the last position that is read.
    pub context_ids: ContextIds,
    /// Whose activations, as [`crate::example::Kind::code`].
    pub kind: u8,
    /// The question, for people.
    pub question: Arc<str>,
    /// The answer, for people.
    pub answer: Arc<str>,
    /// The example's own `meta`, as canonical JSON.
    pub meta: Arc<str>,
}

/// How the layers of an example become datapoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayersPerExample {
    /// One datapoint per layer.
    Each,
    /// One layer, drawn by the example's id.
    One,
    /// One datapoint that reads all layers.
    Together,
}

/// What all examples of a data set share.
#[derive(Debug, Clone)]
pub struct Common {
    /// Keys every draw.
    pub seed: u64,
    /// Layers of the target.
    pub num_layers: usize,
    /// Layers read, where an example does not say.
    pub read_layers: Vec<usize>,
    /// How layers become datapoints.
    pub layers_per_example: LayersPerExample,
    /// Longest prompt with answer, in tokens.
    pub max_input_tokens: usize,
    /// Longest context after its cut, in tokens.
    pub max_context_tokens: usize,
}

/// One rule of a source's mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Its share of the source's examples.
    pub share: f64,
    /// The rule.
    pub positions: Positions,
}

/// What an example that is kept makes.
#[derive(Debug)]
pub struct Kept {
    /// Its datapoints.
    pub datapoints: Vec<Datapoint>,
    /// Whether its `meta` says that the context does not tell the answer.
    pub is_unanswerable: bool,
    /// Whether it was to be so, but no other context was found for it.
    pub lacks_donor: bool,
}

/// What became of an example.
#[derive(Debug)]
pub enum Outcome {
    /// What was made of it.
    Kept(Kept),
    /// Left out, for this reason.
    Dropped(&'static str),
    /// It cannot be used.
    Bad(Error),
}

/// What is asked about a context.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) id: String,
    pub(crate) source: Arc<str>,
    pub(crate) text: String,
    pub(crate) answer: String,
    /// Which layers are read, where the example says it.
    pub(crate) layers: Option<Vec<Layer>>,
    pub(crate) target: Kind,
    pub(crate) meta: Map<String, Value>,
}

/// What stands in the `meta` of an example whose context does not tell the answer.
pub(crate) const UNANSWERABLE: &str = "unanswerable";

/// The datapoints of one question about `read_positions` of `context`.
///
/// # Errors
/// If the question cannot be used. Being too long is no error but a drop.
pub(crate) fn datapoints(
    framer: &Framer,
    common: &Common,
    layers_per_example: LayersPerExample,
    context: &Arc<[i32]>,
    read_positions: Vec<i32>,
    question: Question,
) -> Result<Outcome> {
    if strip(&question.text).is_empty() {
        return Err(Error::value("empty_question", "the question is empty; give it text"));
    }
    let length = read_positions.iter().max().map_or(0, |&last| last as usize + 1);
    if length > common.max_context_tokens {
        return Ok(Outcome::Dropped("context_too_long"));
    }
    let layers = layers_of(common, layers_per_example, &question)?;
    let answer_ids = framer.answer(&question.answer)?;
    let is_unanswerable = question.meta.get(UNANSWERABLE) == Some(&Value::Bool(true));
    let shared = Shared {
        source: question.source,
        context_ids: ContextIds::new(Arc::clone(context), length),
        question: Arc::from(question.text),
        answer: Arc::from(question.answer),
        meta: Arc::from(canonical_json(&Value::Object(question.meta))),
        read_positions,
        kind: question.target.code(),
        answer_ids,
    };
    let each = layers_per_example == LayersPerExample::Each;
    let mut kept = Kept { datapoints: Vec::with_capacity(layers.len()), is_unanswerable, lacks_donor: false };
    for layers in layers {
        let id = if each { format!("{}@L{}", question.id, layers[0]) } else { question.id.clone() };
        let datapoint = shared.datapoint(framer, id, &layers)?;
        if datapoint.input_ids.len() > common.max_input_tokens {
            return Ok(Outcome::Dropped("input_too_long"));
        }
        kept.datapoints.push(datapoint);
    }
    Ok(Outcome::Kept(kept))
}

/// The first tokens of a context, which datapoints that read it hold in common.
///
/// As a slice it is what is shown; examples of one context show more or less of the same tokens.
#[derive(Debug, Clone)]
pub struct ContextIds {
    whole: Arc<[i32]>,
    shown: usize,
}

impl ContextIds {
    /// The first `shown` of `whole`, at most all.
    #[must_use]
    pub fn new(whole: Arc<[i32]>, shown: usize) -> Self {
        let shown = shown.min(whole.len());
        Self { whole, shown }
    }

    /// Where the tokens lie: the same for all that hold them in common.
    pub(crate) fn place(&self) -> *const i32 {
        self.whole.as_ptr()
    }
}

impl From<&[i32]> for ContextIds {
    fn from(ids: &[i32]) -> Self {
        Self::new(Arc::from(ids), ids.len())
    }
}

impl std::ops::Deref for ContextIds {
    type Target = [i32];

    fn deref(&self) -> &[i32] {
        &self.whole[..self.shown]
    }
}

impl PartialEq for ContextIds {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

/// What the datapoints of one example have in common.
struct Shared {
    source: Arc<str>,
    context_ids: ContextIds,
    question: Arc<str>,
    answer: Arc<str>,
    meta: Arc<str>,
    read_positions: Vec<i32>,
    kind: u8,
    answer_ids: Vec<i32>,
}

impl Shared {
    fn datapoint(&self, framer: &Framer, id: String, layers: &[usize]) -> Result<Datapoint> {
        let num_positions = self.read_positions.len();
        let prompt = framer.prompt(layers, num_positions, &self.question)?;
        let answer_start = prompt.ids.len() as i32;
        Ok(Datapoint {
            id,
            source: Arc::clone(&self.source),
            input_ids: [prompt.ids, self.answer_ids.clone()].concat(),
            answer_start,
            placeholders: prompt.placeholders,
            layers: layers.iter().flat_map(|&layer| std::iter::repeat_n(layer as i16, num_positions)).collect(),
            read_positions: self.read_positions.repeat(layers.len()),
            context_ids: self.context_ids.clone(),
            kind: self.kind,
            question: Arc::clone(&self.question),
            answer: Arc::clone(&self.answer),
            meta: Arc::clone(&self.meta),
        })
    }
}

/// The tokens that the example `id` reads among `readable`, by its own rule or by one drawn from the source's.
pub(crate) fn read_positions(
    seed: u64,
    id: &str,
    own: Option<&Positions>,
    reads: &[Share],
    readable: &[i32],
) -> Result<Vec<i32>> {
    let mut draws = Draws::new(seed, id, "read");
    let rule = own.unwrap_or_else(|| draw_rule(reads, &mut draws));
    choose(rule, readable, &mut draws)
}

fn draw_rule<'a>(reads: &'a [Share], draws: &mut Draws) -> &'a Positions {
    let mut left = draws.unit();
    for read in reads {
        left -= read.share;
        if left < 0.0 {
            return &read.positions;
        }
    }
    // Shares add up to one but for rounding; what rounding leaves belongs to the last.
    reads.last().map_or(&Positions::All, |read| &read.positions)
}

/// The tokens that `rule` chooses among `readable`.
fn choose(rule: &Positions, readable: &[i32], draws: &mut Draws) -> Result<Vec<i32>> {
    let available = readable.len();
    match rule {
        Positions::All => Ok(readable.to_vec()),
        Positions::Listed(listed) if listed.is_empty() => Err(Error::input("\"positions\" is an empty list; name at least one, or leave it out")),
        Positions::Listed(listed) => listed
            .iter()
            .map(|&index| {
                let at = if index < 0 { index + available as i64 } else { index };
                usize::try_from(at).ok().and_then(|at| readable.get(at).copied()).ok_or_else(|| {
                    let what = format!(
                        "\"positions\" names index {index}, but there are {available} readable tokens; expected {} to {}",
                        -(available as i64),
                        available - 1
                    );
                    Error::value("position_out_of_range", what)
                })
            })
            .collect(),
        Positions::Window { window, before_end } => {
            let length = draws.between(window[0], window[1]);
            let distance = draws.between(before_end[0], before_end[1]).min(available - 1);
            let end = available - distance;
            Ok(readable[end - length.min(end)..end].to_vec())
        }
    }
}

/// A layer that is named twice.
pub(crate) fn repeated(layers: &[usize]) -> Option<usize> {
    (1..layers.len()).find(|&at| layers[..at].contains(&layers[at])).map(|at| layers[at])
}

/// The layers of each of the example's datapoints.
fn layers_of(common: &Common, layers_per_example: LayersPerExample, question: &Question) -> Result<Vec<Vec<usize>>> {
    let layers: Vec<usize> = match &question.layers {
        None => common.read_layers.clone(),
        Some(layers) if layers.is_empty() => {
            return Err(Error::input("\"layers\" is an empty list; name at least one layer or leave it out"));
        }
        Some(layers) => layers.iter().map(|layer| layer.resolve(common.num_layers)).collect::<Result<_>>()?,
    };
    if let Some(layer) = repeated(&layers) {
        let what = format!("\"layers\" names layer {layer} twice; name each layer once, as index or as depth");
        return Err(Error::value("repeated_layer", what));
    }
    Ok(match layers_per_example {
        LayersPerExample::Each => layers.into_iter().map(|layer| vec![layer]).collect(),
        LayersPerExample::Together => vec![layers],
        LayersPerExample::One => {
            let drawn = Draws::new(common.seed, &question.id, "layer").between(0, layers.len() - 1);
            vec![vec![layers[drawn]]]
        }
    })
}
