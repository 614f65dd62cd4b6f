//! Context prediction: a question about the tokens next to those that are read, and its answer, from a context alone.

use serde::Deserialize;

use crate::datapoint::SPECIAL_TOKEN;
use crate::error::Result;
use crate::frame::{FramedContext, Framer};
use crate::sample::Draws;
use crate::span::TokenSpan;

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
    let drawing = Drawing::new(settings, &mut draws);
    let most = settings.max_context_tokens.min(most_context_tokens);
    let stretch = if settings.within_assistant {
        let turns = framer.contents(context, "assistant")?;
        drawing.fitting(turns, most).map(|turns| turns[draws.between(0, turns.len() - 1)])
    } else {
        let whole = TokenSpan { start: framer.num_lead_tokens(context), end: context.ids.len() };
        drawing.fitting(vec![whole], most).map(|whole| whole[0])
    };
    let TokenSpan { start, end } = match stretch {
        Ok(stretch) => stretch,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut reason = "";
    for _ in 0..MOST_DRAWS {
        let place = drawing.place(end - start, &mut draws);
        let answer_ids = &context.ids[start + place.answer_start..][..place.num_answer];
        if answer_ids.iter().any(|&id| framer.tokenizer().is_special(id)) {
            reason = SPECIAL_TOKEN;
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

/// How an example draws: which way it looks, and within which bounds.
struct Drawing {
    read: [usize; 2],
    answer: [usize; 2],
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
    fn new(settings: &LensSettings, draws: &mut Draws) -> Self {
        let single = draws.unit() < settings.single_share;
        let next = match settings.direction {
            Direction::Next => true,
            Direction::Previous => false,
            Direction::Both => draws.below(2) == 0,
        };
        let read = if single { [1, 1] } else { settings.window };
        Self { read, answer: settings.predict, next }
    }

    /// Those of `stretches` that have room for the least that is asked for before token `most`, cut there; or the reason
    /// why none has.
    fn fitting(&self, stretches: Vec<TokenSpan>, most: usize) -> Result<Vec<TokenSpan>, &'static str> {
        if stretches.is_empty() {
            return Err("no_assistant_turn");
        }
        let least = self.read[0].saturating_add(self.answer[0]);
        let fits = |stretch: &TokenSpan| stretch.end.saturating_sub(stretch.start) >= least;
        if !stretches.iter().any(fits) {
            return Err("context_too_short");
        }
        let cut = |stretch: TokenSpan| TokenSpan { end: stretch.end.min(most), ..stretch };
        let fitting: Vec<TokenSpan> = stretches.into_iter().map(cut).filter(fits).collect();
        if fitting.is_empty() { Err("beyond_max_context_tokens") } else { Ok(fitting) }
    }

    /// Draw from `available` tokens, which are enough.
    fn place(&self, available: usize, draws: &mut Draws) -> Place {
        let Self { read: [least_read, most_read], answer: [least_answer, most_answer], next } = *self;
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
