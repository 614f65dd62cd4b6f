//! From an example to datapoints: which positions, which layers, which tokens.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::example::{Example, Positions};
use crate::frame::{FramedContext, Framer};
use crate::lens::{self, LensSettings};
use crate::manifest::canonical_json;
use crate::sample::Draws;

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
    pub context_ids: Arc<[i32]>,
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

/// What a source's examples are.
#[derive(Debug, Clone)]
pub enum SourceKind {
    /// Complete examples.
    Records,
    /// Contexts, from which question and answer are made.
    ContextPrediction(LensSettings),
}

/// One source of examples.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its name, where an example does not say its own.
    pub name: Arc<str>,
    /// What its examples are.
    pub kind: SourceKind,
    /// Which positions they read, where an example does not say.
    pub reads: Vec<Share>,
}

/// What became of an example.
#[derive(Debug)]
pub enum Outcome {
    /// Its datapoints.
    Kept(Vec<Datapoint>),
    /// Left out, for this reason.
    Dropped(&'static str),
}

/// What is asked about which positions of which context.
pub(crate) struct Asked {
    pub(crate) context: FramedContext,
    pub(crate) read_positions: Vec<i32>,
    pub(crate) question: String,
    pub(crate) answer: String,
}

/// The datapoints of `example`.
///
/// # Errors
/// If the example cannot be used. Being too long is no error but a drop.
pub fn build(framer: &Framer, common: &Common, source: &Source, example: Example) -> Result<Outcome> {
    let asked = match &source.kind {
        SourceKind::Records => ask_record(framer, common, source, &example)?,
        SourceKind::ContextPrediction(settings) => match lens::ask(framer, common, settings, &example)? {
            Ok(asked) => asked,
            Err(reason) => return Ok(Outcome::Dropped(reason)),
        },
    };
    let length = asked.read_positions.iter().max().map_or(0, |&last| last as usize + 1);
    if length > common.max_context_tokens {
        return Ok(Outcome::Dropped("context_too_long"));
    }
    let layers = layers_of(common, &example)?;
    let answer = framer.answer(&asked.answer)?;
    let shared = Shared {
        source: example.source.as_deref().map_or_else(|| Arc::clone(&source.name), Arc::from),
        context_ids: Arc::from(&asked.context.ids[..length]),
        question: Arc::from(asked.question),
        answer: Arc::from(asked.answer),
        meta: Arc::from(canonical_json(&Value::Object(example.meta))),
        read_positions: asked.read_positions,
        kind: example.target.code(),
        answer_ids: answer,
    };
    let each = common.layers_per_example == LayersPerExample::Each;
    let mut kept = Vec::with_capacity(layers.len());
    for layers in layers {
        let id = if each { format!("{}@L{}", example.id, layers[0]) } else { example.id.clone() };
        let datapoint = shared.datapoint(framer, id, &layers)?;
        if datapoint.input_ids.len() > common.max_input_tokens {
            return Ok(Outcome::Dropped("input_too_long"));
        }
        kept.push(datapoint);
    }
    Ok(Outcome::Kept(kept))
}

/// What the datapoints of one example have in common.
struct Shared {
    source: Arc<str>,
    context_ids: Arc<[i32]>,
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
            context_ids: Arc::clone(&self.context_ids),
            kind: self.kind,
            question: Arc::clone(&self.question),
            answer: Arc::clone(&self.answer),
            meta: Arc::clone(&self.meta),
        })
    }
}

fn ask_record(framer: &Framer, common: &Common, source: &Source, example: &Example) -> Result<Asked> {
    let missing = |field: &str| Error::input(format!("the field {field:?} is missing"));
    let question = example.question.clone().ok_or_else(|| missing("question"))?;
    let answer = example.answer.clone().ok_or_else(|| missing("answer"))?;
    let context = framer.context(&example.context)?;
    let readable = framer.readable(&context, example.read.as_deref())?;
    let mut draws = Draws::new(common.seed, &example.id, "read");
    let rule = match &example.positions {
        Some(rule) => rule,
        None => draw_rule(&source.reads, &mut draws),
    };
    let read_positions = choose(rule, &readable, &mut draws)?;
    Ok(Asked { context, read_positions, question, answer })
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
        Positions::Listed(listed) if listed.is_empty() => Err(Error::input("\"positions\" is an empty list")),
        Positions::Listed(listed) => listed
            .iter()
            .map(|&index| {
                let at = if index < 0 { index + available as i64 } else { index };
                usize::try_from(at).ok().and_then(|at| readable.get(at).copied()).ok_or_else(|| {
                    Error::input(format!("\"positions\" names index {index} of {available} readable tokens"))
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

/// The layers of each of the example's datapoints.
fn layers_of(common: &Common, example: &Example) -> Result<Vec<Vec<usize>>> {
    let layers = match &example.layers {
        None => common.read_layers.clone(),
        Some(layers) if layers.is_empty() => return Err(Error::input("\"layers\" is an empty list")),
        Some(layers) => layers.iter().map(|layer| layer.resolve(common.num_layers)).collect::<Result<_>>()?,
    };
    Ok(match common.layers_per_example {
        LayersPerExample::Each => layers.into_iter().map(|layer| vec![layer]).collect(),
        LayersPerExample::Together => vec![layers],
        LayersPerExample::One => {
            let drawn = Draws::new(common.seed, &example.id, "layer").between(0, layers.len() - 1);
            vec![vec![layers[drawn]]]
        }
    })
}
