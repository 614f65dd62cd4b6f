//! What a chat template does with single turns: what it puts around a user's, and what closes an assistant's.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::example::Message;
use crate::locate::{Cut, mark, split_at_marks};
use crate::template::Template;
use crate::tokenize::Tokenizer;

/// What the chat template puts around a user's turn, and what it cuts from it.
#[derive(Debug)]
pub(crate) struct PromptShape {
    /// The text before the turn's content.
    pub(crate) before: String,
    after: String,
    cut: Cut,
    /// Whether this is known of every turn that the template takes for inert.
    affine: bool,
}

impl PromptShape {
    /// Split the template around a user's turn, and check the split on a turn with outer white space.
    pub(crate) fn new(template: &Template) -> Result<Self> {
        let once = || Error::template("it does not show a user's turn exactly once");
        template.render(&[user("x")], true)?;
        let skeleton = template.skeleton(&[user("x")], true).map_err(|_| once())?;
        let affine = skeleton.cuts.is_some();
        let [before, after] = &skeleton.pieces[..] else { return Err(once()) };
        let odd = "Layer: 0\n ? \n  two  words\t\n ";
        let rendered = template.render(&[user(odd)], true)?;
        [Cut::Nothing, Cut::LineEnds, Cut::Space]
            .into_iter()
            .map(|cut| Self { before: before.clone(), after: after.clone(), cut, affine })
            .find(|shape| shape.around(odd) == rendered)
            .ok_or_else(|| Error::template("it changes a user's turn by more than its outer white space"))
    }

    /// `content`, which begins with no white space, as a user's turn with the generation prompt. Where the template could
    /// do more with it, it is rendered, to see.
    pub(crate) fn turn(&self, template: &Template, content: &str) -> Result<String> {
        let text = self.around(content);
        if !(self.affine && template.inert(content)) && template.render(&[user(content)], true)? != text {
            return Err(Error::template(
                "a question changes what the template puts around it, so its placeholders cannot be found; reword it",
            ));
        }
        Ok(text)
    }

    fn around(&self, content: &str) -> String {
        [&self.before, self.cut.end(content), &self.after].concat()
    }
}

/// Whether a conversation gets the generation prompt: always, unless the assistant has just spoken.
pub(crate) fn generation(messages: &[Message]) -> bool {
    messages.last().is_none_or(|message| message.role != "assistant")
}

pub(crate) fn user(content: &str) -> Message {
    Message { role: "user".to_owned(), content: content.to_owned() }
}

/// The special token `name` and its id, if there is one.
pub(crate) fn token_of(
    tokenizer: &Tokenizer,
    variables: &Map<String, Value>,
    name: &str,
) -> Result<Option<(String, i32)>> {
    let Some(value) = variables.get(name) else { return Ok(None) };
    let content =
        value.as_str().ok_or_else(|| Error::input(format!("{name} must be a string or null, got {value}")))?;
    match tokenizer.encode(content)?[..] {
        [id] => Ok(Some((content.to_owned(), id))),
        ref ids => Err(Error::input(format!(
            "{name} {content:?} must be one token of this tokenizer, got {} tokens",
            ids.len()
        ))),
    }
}

/// What closes an assistant's turn: the first special token behind its content, else the end of the sequence.
pub(crate) fn end_of_turn(tokenizer: &Tokenizer, template: &Template, eos: Option<&(String, i32)>) -> Result<i32> {
    let turns = [user("x"), Message { role: "assistant".to_owned(), content: mark(0) }];
    let behind = template
        .render(&turns, false)
        .ok()
        .and_then(|text| split_at_marks(&text, 1))
        .and_then(|pieces| pieces.into_iter().nth(1))
        .unwrap_or_default();
    tokenizer.encode(&behind)?.into_iter().find(|&id| tokenizer.is_special(id)).or(eos.map(|(_, id)| *id)).ok_or_else(
        || {
            Error::template(
                "no special token closes an assistant's turn and there is no eos_token; give one in the special tokens",
            )
        },
    )
}
