//! From an example to datapoints: which positions, which layers, which tokens.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::columns::{Columns, Row};
use crate::error::{Error, Result};
use crate::example::{Kind, Layer, Positions};
use crate::frame::Framer;
use crate::manifest::canonical_object;
use crate::memo::{Prompt, Prompts};
use crate::sample::Draws;
use crate::source::strip;

/// A datapoint as [`crate::layout::decode`] reads it back; [`Row`] is what is written.
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

impl Datapoint {
    /// The same, to be written again.
    #[must_use]
    pub fn row(&self) -> Row<'_> {
        let (prompt_ids, answer_ids) = self.input_ids.split_at(self.answer_start as usize);
        Row {
            id: &self.id,
            source: &self.source,
            prompt_ids,
            answer_ids,
            placeholders: &self.placeholders,
            layers: &self.layers,
            read_positions: &self.read_positions,
            context_ids: &self.context_ids,
            kind: self.kind,
            question: &self.question,
            answer: &self.answer,
            meta: &self.meta,
        }
    }
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

/// What an example that is kept makes: one datapoint for each prompt.
pub(crate) struct Kept {
    pub(crate) question: Question,
    pub(crate) answer_ids: Vec<i32>,
    pub(crate) read_positions: Vec<i32>,
    pub(crate) context_ids: ContextIds,
    /// With the layers of each.
    pub(crate) prompts: Vec<(Vec<usize>, Arc<Prompt>)>,
    /// Whether ids name the layer, as an example makes a datapoint for each.
    pub(crate) is_one_per_layer: bool,
    /// Whether it was to be unanswerable, but no other context was found for it.
    pub(crate) lacks_donor: bool,
}

impl Kept {
    /// Whether its `meta` says that the context does not tell the answer.
    pub(crate) fn is_unanswerable(&self) -> bool {
        self.question.meta.get(UNANSWERABLE) == Some(&Value::Bool(true))
    }

    /// Add the datapoints to `columns`.
    pub(crate) fn push_to(&self, columns: &mut Columns) {
        let Question { id, source, text, answer, target, meta, .. } = &self.question;
        let meta = canonical_object(meta);
        let mut own_id = String::new();
        for (layers, prompt) in &self.prompts {
            own_id.clear();
            own_id.push_str(id);
            if self.is_one_per_layer {
                own_id.push_str(&format!("@L{}", layers[0]));
            }
            let each = self.read_positions.len();
            let own_layers: Vec<i16> =
                layers.iter().flat_map(|&layer| std::iter::repeat_n(layer as i16, each)).collect();
            columns.push(&Row {
                id: &own_id,
                source,
                prompt_ids: &prompt.ids,
                answer_ids: &self.answer_ids,
                placeholders: &prompt.placeholders,
                layers: &own_layers,
                read_positions: &self.read_positions.repeat(layers.len()),
                context_ids: &self.context_ids,
                kind: target.code(),
                question: text,
                answer,
                meta: &meta,
            });
        }
    }
}

/// What became of an example.
pub(crate) enum Outcome {
    /// What was made of it.
    Kept(Box<Kept>),
    /// Left out, for this reason.
    Dropped(&'static str),
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

/// The reason that an answer with a special token is dropped for: an oracle would learn to end its turn, or to begin a text.
pub(crate) const SPECIAL_TOKEN: &str = "special_token_in_answer";

/// The datapoints of one question about `read_positions` of `context`.
///
/// # Errors
/// If the question cannot be used. Being too long is no error but a drop.
pub(crate) fn datapoints(
    framer: &Framer,
    prompts: &Prompts,
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
    let (_, said) = answer_ids.split_last().expect("an answer ends with the end of turn");
    if said.iter().any(|&id| framer.tokenizer().is_special(id)) {
        return Ok(Outcome::Dropped(SPECIAL_TOKEN));
    }
    let prompts: Vec<_> = layers
        .into_iter()
        .map(|layers| {
            let prompt = prompts.get(framer, &layers, read_positions.len(), &question.text)?;
            Ok((layers, prompt))
        })
        .collect::<Result<_>>()?;
    if prompts.iter().any(|(_, prompt)| prompt.ids.len() + answer_ids.len() > common.max_input_tokens) {
        return Ok(Outcome::Dropped("input_too_long"));
    }
    Ok(Outcome::Kept(Box::new(Kept {
        context_ids: ContextIds::new(Arc::clone(context), length),
        question,
        answer_ids,
        read_positions,
        prompts,
        is_one_per_layer: layers_per_example == LayersPerExample::Each,
        lacks_donor: false,
    })))
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

    /// All tokens that are held in common.
    pub(crate) fn whole(&self) -> &Arc<[i32]> {
        &self.whole
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
