//! Context prediction: a question about the tokens next to those that are read, and its answer, from a context alone.

use serde::Deserialize;

use crate::error::Result;
use crate::example::{Context, Read};
use crate::frame::{FramedContext, Framer};
use crate::sample::Draws;

/// Which way a question looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Either, half of the examples each.
    #[default]
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
    /// Only what the assistant says is read and predicted, one turn of it at a time.
    pub within_assistant: bool,
}

/// How often a place is drawn whose answer is text: not one that crosses from turn to turn or cuts a character.
const MOST_DRAWS: usize = 16;

/// What is read and asked.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) read_positions: Vec<i32>,
    pub(crate) question: String,
    pub(crate) answer: String,
}

/// What is read and asked of `context` by the example `id`, or the reason why nothing can be.
pub(crate) fn draw(
    framer: &Framer,
    seed: u64,
    most_context_tokens: usize,
    settings: &LensSettings,
    context: &FramedContext,
    id: &str,
) -> Result<Result<Window, &'static str>> {
    let mut draws = Draws::new(seed, id, "lens");
    let (start, end) = if settings.within_assistant {
        match assistant_turn(framer, context, &mut draws)? {
            Ok(turn) => turn,
            Err(reason) => return Ok(Err(reason)),
        }
    } else {
        (framer.num_lead_tokens(context), context.ids.len())
    };
    let end = end.min(settings.max_context_tokens).min(most_context_tokens);
    let Some(drawing) = Drawing::new(settings, end.saturating_sub(start), &mut draws) else {
        return Ok(Err("context_too_short"));
    };
    let mut reason = "";
    for _ in 0..MOST_DRAWS {
        let place = drawing.place(&mut draws);
        let answer_ids = &context.ids[start + place.answer_start..][..place.num_answer];
        if answer_ids.iter().any(|&id| framer.tokenizer().is_special(id)) {
            reason = "special_token_in_answer";
            continue;
        }
        let answer = framer.tokenizer().decode(answer_ids)?;
        if answer.is_empty() || answer.contains(char::REPLACEMENT_CHARACTER) {
            reason = "answer_not_decodable";
            continue;
        }
        let first = (start + place.read_start) as i32;
        return Ok(Ok(Window {
            read_positions: (first..first + place.num_read as i32).collect(),
            question: drawing.question(place.num_answer),
            answer,
        }));
    }
    Ok(Err(reason))
}

/// The tokens of one of the assistant's contents, drawn.
fn assistant_turn(
    framer: &Framer,
    context: &FramedContext,
    draws: &mut Draws,
) -> Result<Result<(usize, usize), &'static str>> {
    let turns: Vec<(usize, usize)> = match context.source() {
        Context::Text(_) => Vec::new(),
        Context::Messages(messages) => (0..)
            .zip(messages)
            .filter(|(_, message)| message.role == "assistant" && !message.content.trim().is_empty())
            .map(|(at, message)| (at, message.content.chars().count()))
            .collect(),
    };
    if turns.is_empty() {
        return Ok(Err("no_assistant_turn"));
    }
    let (message, length) = turns[draws.between(0, turns.len() - 1)];
    let read = Read { message: Some(message), start: Some(0), end: Some(length), onwards: false };
    let tokens = framer.readable(context, Some(&[read]))?;
    Ok(Ok((tokens[0] as usize, tokens[tokens.len() - 1] as usize + 1)))
}

/// How an example draws: which way it looks, and within which bounds.
struct Drawing {
    read: [usize; 2],
    answer: [usize; 2],
    available: usize,
    next: bool,
}

/// Where one draw fell, in tokens counted from the first that may be read.
struct Place {
    read_start: usize,
    num_read: usize,
    answer_start: usize,
    num_answer: usize,
}

impl Drawing {
    /// Draw from `available` tokens; `None` if the least that is asked for does not fit.
    fn new(settings: &LensSettings, available: usize, draws: &mut Draws) -> Option<Self> {
        let single = draws.unit() < settings.single_share;
        let next = match settings.direction {
            Direction::Next => true,
            Direction::Previous => false,
            Direction::Both => draws.below(2) == 0,
        };
        let read = if single { [1, 1] } else { settings.window };
        let answer = settings.predict;
        (available >= read[0].saturating_add(answer[0])).then_some(Self { read, answer, available, next })
    }

    fn place(&self, draws: &mut Draws) -> Place {
        let Self { read: [least_read, most_read], answer: [least_answer, most_answer], available, next } = *self;
        let num_answer = draws.between(least_answer, most_answer.min(available - least_read));
        let num_read = draws.between(least_read, most_read.min(available - num_answer));
        let start = draws.between(0, available - num_read - num_answer);
        let (read_start, answer_start) = if next { (start, start + num_read) } else { (start + num_answer, start) };
        Place { read_start, num_read, answer_start, num_answer }
    }

    fn question(&self, count: usize) -> String {
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
