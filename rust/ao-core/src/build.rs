//! From the units of one shard to its datapoints, in parallel and in order.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::columns::Columns;
use crate::datapoint::{Common, Outcome, Question, UNANSWERABLE, datapoints, read_positions};
use crate::error::{Error, Result};
use crate::frame::{FramedContext, Framer};
use crate::lens;
use crate::memo::Prompts;
use crate::sample::Draws;
use crate::source::{About, Asked, Body, Posed, Source, Unit};
use crate::stats::Stats;

/// How often another context is drawn for an unanswerable example before it stays as it is.
const DONOR_DRAWS: usize = 8;

/// How many runs of units with one context a block is made of: enough to share its buffers, few enough to balance threads.
const RUNS_PER_BLOCK: usize = 64;

/// What was built of consecutive units.
#[derive(Default)]
pub(crate) struct Block {
    pub(crate) columns: Columns,
    pub(crate) stats: Stats,
    /// Of the examples that cannot be used, in order.
    pub(crate) errors: Vec<Error>,
}

impl Block {
    fn add(&mut self, source: &Source, outcome: Result<Outcome>) {
        // Records may say another source than their file's; readers know them by it.
        let name = match &outcome {
            Ok(Outcome::Kept(kept)) => &kept.question.source,
            _ => &source.name,
        };
        let counts = self.stats.source(name);
        counts.offered += 1;
        match outcome {
            Ok(Outcome::Kept(kept)) => {
                counts.keep(&kept, source.counts_answers());
                kept.push_to(&mut self.columns);
            }
            Ok(Outcome::Dropped(reason)) => counts.drop_one(reason),
            Err(error) => {
                counts.pass_over(error.reason());
                self.errors.push(error);
            }
        }
    }
}

/// Build all examples of `units`, which are those of one shard, on all threads, in order.
pub(crate) fn build(framer: &Framer, prompts: &Prompts, common: &Common, units: &[Unit]) -> Vec<Block> {
    let runs: Vec<&[Unit]> = units.chunk_by(same_context).collect();
    let donors = Donors::of(units);
    let building = Building { framer, prompts, common, donors: &donors };
    runs.par_chunks(RUNS_PER_BLOCK)
        .map(|runs| {
            let mut block = Block::default();
            for run in runs {
                building.run(run, &mut block);
            }
            block
        })
        .collect()
}

/// The datapoints of a shard, and its counts.
pub(crate) fn gather(blocks: &[Block]) -> (Columns, Stats) {
    let columns = Columns::joined(blocks.iter().map(|block| &block.columns));
    let mut stats = Stats::default();
    for block in blocks {
        stats.add(&block.stats);
    }
    stats.measure(&columns);
    (columns, stats)
}

/// Whether two units of one source stand side by side with the same context, which is then tokenized once.
fn same_context(one: &Unit, next: &Unit) -> bool {
    match (&one.body, &next.body) {
        (Body::Context(one_asked), Body::Context(next_asked)) => {
            Arc::ptr_eq(&one.source, &next.source) && one_asked.context == next_asked.context
        }
        _ => false,
    }
}

/// What building units needs: the framer, the settings, and the contexts of the shard's other units.
struct Building<'a> {
    framer: &'a Framer,
    prompts: &'a Prompts,
    common: &'a Common,
    donors: &'a Donors<'a>,
}

impl Building<'_> {
    /// Build each example of `run`, whose units have the same context.
    fn run(&self, run: &[Unit], block: &mut Block) {
        let mut framed: Option<Result<Framed>> = None;
        for unit in run {
            let mut is_bad = false;
            for &at in &unit.examples {
                let outcome = match &unit.body {
                    Body::Dropped(reason) => Ok(Outcome::Dropped(reason)),
                    Body::Bad(error) => Err(error.again()),
                    Body::Context(asked) => match framed.get_or_insert_with(|| Framed::new(self.framer, asked)) {
                        Ok(framed) => self.outcome(framed, unit, asked, at),
                        Err(error) => Err(error.again()),
                    }
                    .or_else(|error| left_out(unit, error))
                    .map_err(|error| unit.error(at, error)),
                };
                // Errors count rows, however many examples a row makes.
                let outcome = if is_bad { outcome.or(Ok(Outcome::Dropped("of_a_bad_row"))) } else { outcome };
                is_bad |= outcome.is_err();
                block.add(&unit.source, outcome);
            }
        }
    }

    fn outcome(&self, framed: &Framed, unit: &Unit, asked: &Asked, at: u32) -> Result<Outcome> {
        let mut question = match unit.source.question(unit, asked, at)? {
            Posed::Written(question) => question,
            Posed::OfTokens => return self.lens(framed, unit, at),
            Posed::Dropped(reason) => return Ok(Outcome::Dropped(reason)),
        };
        // Also where another context is to be read: a context that cannot be used is bad in its own row, whatever is drawn.
        let positions = self.positions(framed, unit, asked, &question.id)?;
        let Some((mut draws, answer)) = unanswerable(unit, &question.id) else {
            return self.datapoints(framed, unit, positions, question);
        };
        let Some((donor, positions)) = self.donor(unit, asked, &question.id, &mut draws) else {
            let mut outcome = self.datapoints(framed, unit, positions, question)?;
            if let Outcome::Kept(kept) = &mut outcome {
                kept.lacks_donor = true;
            }
            return Ok(outcome);
        };
        answer.clone_into(&mut question.answer);
        question.meta.insert(UNANSWERABLE.to_owned(), Value::Bool(true));
        self.datapoints(&donor, unit, positions, question)
    }

    /// The tokens that the written question `id` reads of a context.
    fn positions(&self, framed: &Framed, unit: &Unit, asked: &Asked, id: &str) -> Result<Vec<i32>> {
        let own = match &asked.about {
            About::Record(record) => record.positions.as_ref(),
            _ => None,
        };
        let readable = self.framer.readable(&framed.context, asked.read.as_deref())?;
        read_positions(self.common.seed, id, own, &unit.source.reads, &readable)
    }

    /// A question that is made from the tokens.
    fn lens(&self, framed: &Framed, unit: &Unit, at: u32) -> Result<Outcome> {
        let settings = unit.source.documents().expect("only documents ask about tokens");
        let id = unit.source.example_id(&unit.id, at);
        let most = self.common.max_context_tokens;
        let window = match lens::draw(self.framer, self.common.seed, most, settings, &framed.context, &id)? {
            Ok(window) => window,
            Err(reason) => return Ok(Outcome::Dropped(reason)),
        };
        let question = Question {
            id,
            source: unit.source.name.clone(),
            text: window.question,
            answer: window.answer,
            layers: None,
            target: crate::example::Kind::Base,
            meta: Map::new(),
        };
        self.datapoints(framed, unit, window.read_positions, question)
    }

    fn datapoints(&self, framed: &Framed, unit: &Unit, positions: Vec<i32>, question: Question) -> Result<Outcome> {
        let layers = unit.source.layers_per_example.unwrap_or(self.common.layers_per_example);
        datapoints(self.framer, self.prompts, self.common, layers, &framed.ids, positions, question)
    }

    /// Another unit's context for the example `id`, which is to be unanswerable, and what is read of it. One that cannot be
    /// used is bad in its own row, and passed over here.
    fn donor(&self, unit: &Unit, asked: &Asked, id: &str, draws: &mut Draws) -> Option<(Framed, Vec<i32>)> {
        let of_source = self.donors.of_source(&unit.source);
        let is_other = |other: &Asked| match (&asked.label, &other.label) {
            (Some(own), Some(label)) => own != label,
            _ => asked.context != other.context,
        };
        let read = |other: &Asked| {
            let framed = Framed::new(self.framer, other).ok()?;
            let positions = self.positions(&framed, unit, other, id).ok()?;
            Some((framed, positions))
        };
        (0..DONOR_DRAWS)
            .map(|_| of_source[draws.below(of_source.len() as u64) as usize])
            .filter(|other| is_other(other))
            .find_map(read)
    }
}

/// A document that has no text, or is no chat to this template, is left out: corpora have such, and nobody wrote them as
/// examples.
fn left_out(unit: &Unit, error: Error) -> Result<Outcome> {
    match error {
        Error::Value { reason, .. } if unit.source.documents().is_some() => Ok(Outcome::Dropped(reason)),
        Error::Template(_) if unit.source.documents().is_some() => Ok(Outcome::Dropped("refused_by_template")),
        error => Err(error),
    }
}

/// For an example that is to be unanswerable, the draws that find its context, and what it answers then.
fn unanswerable<'a>(unit: &'a Unit, id: &str) -> Option<(Draws, &'a str)> {
    let unanswerable = unit.source.unanswerable.as_ref()?;
    let mut draws = Draws::new(unit.source.seed, id, "unanswerable");
    (draws.unit() < unanswerable.share).then_some((draws, &*unanswerable.answer))
}

/// The contexts that an unanswerable example can be given, by the address of their source.
struct Donors<'a>(HashMap<usize, Vec<&'a Asked>>);

impl<'a> Donors<'a> {
    /// Those of `units`, of sources that have unanswerable examples.
    fn of(units: &'a [Unit]) -> Self {
        let mut by_source: HashMap<_, Vec<_>> = HashMap::new();
        for unit in units.iter().filter(|unit| unit.source.unanswerable.is_some()) {
            if let Body::Context(asked) = &unit.body {
                by_source.entry(Arc::as_ptr(&unit.source).addr()).or_default().push(&**asked);
            }
        }
        Self(by_source)
    }

    fn of_source(&self, source: &Arc<Source>) -> &[&'a Asked] {
        self.0.get(&Arc::as_ptr(source).addr()).map_or(&[], Vec::as_slice)
    }
}

/// A context as tokens.
struct Framed {
    context: FramedContext,
    /// The same tokens, for the datapoints to hold in common.
    ids: Arc<[i32]>,
}

impl Framed {
    fn new(framer: &Framer, asked: &Asked) -> Result<Self> {
        let context = framer.context(&asked.context)?;
        Ok(Self { ids: Arc::from(context.ids.as_slice()), context })
    }
}
