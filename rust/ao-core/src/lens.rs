//! Context prediction: a question about the tokens next to those that are read, and its answer, from a context alone.

use crate::datapoint::{Asked, Common};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::frame::Framer;
use crate::sample::Draws;

/// Which way a question looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Either, half of the examples each.
    Both,
    /// The tokens behind.
    Next,
    /// The tokens before.
    Previous,
}

/// How windows and answers are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct LensSettings {
    /// The share of examples that read one token.
    pub single_share: f64,
    /// Least and greatest number of tokens read by the others.
    pub window: [usize; 2],
    /// Least and greatest number of tokens to predict.
    pub predict: [usize; 2],
    /// Which way.
    pub direction: Direction,
    /// Only this many tokens of a text are used.
    pub max_context_tokens: usize,
}

/// What is read and asked for an example that has only a context, or the reason why nothing can be.
pub(crate) fn ask(
    framer: &Framer,
    common: &Common,
    settings: &LensSettings,
    example: &Example,
) -> Result<Result<Asked, &'static str>> {
    for (field, given) in [
        ("question", example.question.is_some()),
        ("answer", example.answer.is_some()),
        ("read", example.read.is_some()),
        ("positions", example.positions.is_some()),
    ] {
        if given {
            return Err(Error::input(format!(
                "a context prediction example makes its own {field:?}; leave the field out or use a source of kind \"records\""
            )));
        }
    }
    let context = framer.context(&example.context)?;
    let lead = framer.num_lead_tokens(&context);
    let end = context.ids.len().min(settings.max_context_tokens);
    let mut draws = Draws::new(common.seed, &example.id, "lens");
    let Some(window) = Drawn::new(settings, end.saturating_sub(lead), &mut draws) else {
        return Ok(Err("context_too_short"));
    };
    let answer_ids = &context.ids[lead + window.answer_start..][..window.num_answer];
    if answer_ids.iter().any(|&id| framer.tokenizer().is_special(id)) {
        return Ok(Err("special_token_in_answer"));
    }
    let answer = framer.tokenizer().decode(answer_ids)?;
    if answer.is_empty() || answer.contains(char::REPLACEMENT_CHARACTER) {
        return Ok(Err("answer_not_decodable"));
    }
    let first = (lead + window.read_start) as i32;
    Ok(Ok(Asked {
        context,
        read_positions: (first..first + window.num_read as i32).collect(),
        question: window.question(),
        answer,
    }))
}

/// One draw, in tokens counted from the first that may be read.
struct Drawn {
    read_start: usize,
    num_read: usize,
    answer_start: usize,
    num_answer: usize,
    next: bool,
}

impl Drawn {
    /// Draw from `available` tokens; `None` if the least that is asked for does not fit.
    fn new(settings: &LensSettings, available: usize, draws: &mut Draws) -> Option<Self> {
        let single = draws.unit() < settings.single_share;
        let next = match settings.direction {
            Direction::Next => true,
            Direction::Previous => false,
            Direction::Both => draws.below(2) == 0,
        };
        let [least_read, most_read] = if single { [1, 1] } else { settings.window };
        let [least_answer, most_answer] = settings.predict;
        if available < least_read + least_answer {
            return None;
        }
        let num_answer = draws.between(least_answer, most_answer.min(available - least_read));
        let num_read = draws.between(least_read, most_read.min(available - num_answer));
        let start = draws.between(0, available - num_read - num_answer);
        let (read_start, answer_start) = if next { (start, start + num_read) } else { (start + num_answer, start) };
        Some(Self { read_start, num_read, answer_start, num_answer, next })
    }

    fn question(&self) -> String {
        let count = self.num_answer;
        let plural = count != 1;
        let tokens = if plural { "tokens" } else { "token" };
        if self.next {
            let come = if plural { "come" } else { "comes" };
            format!("Can you predict the next {count} {tokens} that {come} after this?")
        } else {
            format!("Can you predict the previous {count} {tokens} that came before this?")
        }
    }
}
