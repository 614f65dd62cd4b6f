//! Text to aligned token ids: contexts, oracle prompts and answers.
//!
//! One implementation serves packing and asking, so an oracle is asked exactly as it was trained. A prompt is tokenized
//! whole, its placeholders are found by the bytes of their run, and every id is checked.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::example::{Context, Message, Read};
use crate::locate::Located;
use crate::manifest::{canonical_json, sha256_hex};
use crate::span::{ByteSpan, CharSpan, TokenSpan, char_bytes, overlapping};
use crate::template::Template;
use crate::tokenize::Tokenizer;
use crate::turns::{PromptShape, end_of_turn, generation, token_of};

/// Turns contexts, questions and answers into token ids for one tokenizer and one chat template.
pub struct Framer {
    tokenizer: Tokenizer,
    template: Template,
    placeholder: String,
    placeholder_id: i32,
    end_of_turn_id: i32,
    bos: Option<(String, i32)>,
    shape: PromptShape,
    fingerprint: BTreeMap<String, String>,
}

/// A context as tokens.
#[derive(Debug)]
pub struct FramedContext {
    /// The rendered text; of a raw string, the beginning-of-sequence token and the string.
    pub text: String,
    /// The tokens.
    pub ids: Vec<i32>,
    /// How many bytes of `text` stand before a raw string.
    lead: usize,
    /// Where the contents of messages stand, where that is known without a search.
    located: Option<Located>,
    source: Context,
}

/// An oracle prompt as tokens.
#[derive(Debug)]
pub struct FramedPrompt {
    /// The rendered text.
    pub text: String,
    /// The tokens.
    pub ids: Vec<i32>,
    /// The indices of the placeholders among `ids`, layer by layer.
    pub placeholders: Vec<i32>,
}

impl Framer {
    /// Build from the texts of `tokenizer.json`, of the chat template and of a JSON object of template variables
    /// (`bos_token`, `eos_token` and so on; `null` for none).
    ///
    /// # Errors
    /// If one of them cannot be used, or the placeholder is not one token per repetition in a prompt.
    pub fn new(
        tokenizer_json: &str,
        chat_template: &str,
        special_tokens_json: &str,
        placeholder: &str,
        date: &str,
    ) -> Result<Self> {
        let tokenizer = Tokenizer::from_json(tokenizer_json)?;
        let mut variables: Map<String, Value> = serde_json::from_str(special_tokens_json)
            .map_err(|error| Error::input(format!("the special tokens must be a JSON object: {error}")))?;
        variables.retain(|_, value| !value.is_null());
        let template = Template::new(chat_template, &variables, date)?;
        let bos = token_of(&tokenizer, &variables, "bos_token")?;
        let eos = token_of(&tokenizer, &variables, "eos_token")?;
        let end_of_turn_id = end_of_turn(&tokenizer, &template, eos.as_ref())?;
        let shape = PromptShape::new(&template)?;
        let mut framer = Self {
            tokenizer,
            template,
            placeholder: placeholder.to_owned(),
            placeholder_id: -1,
            end_of_turn_id,
            bos,
            shape,
            fingerprint: BTreeMap::new(),
        };
        framer.placeholder_id = framer.find_placeholder()?;
        framer.prompt(&[0, 10], 3, "x")?;
        let date = if framer.template.uses_date() { date } else { "" };
        framer.fingerprint = BTreeMap::from(
            [
                ("tokenizer", framer.tokenizer.fingerprint().to_owned()),
                ("template", sha256_hex(chat_template.as_bytes())),
                ("variables", sha256_hex(canonical_json(&Value::Object(variables)).as_bytes())),
                ("placeholder", placeholder.to_owned()),
                ("placeholder_id", framer.placeholder_id.to_string()),
                ("end_of_turn_id", framer.end_of_turn_id.to_string()),
                ("date", date.to_owned()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        Ok(framer)
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Which library tokenizes, and what was proved of it when it was chosen: for people.
    #[must_use]
    pub fn engine(&self) -> &str {
        self.tokenizer.engine()
    }

    /// The id of the placeholder.
    #[must_use]
    pub fn placeholder_id(&self) -> i32 {
        self.placeholder_id
    }

    /// The id that closes an assistant's turn; every answer ends with it.
    #[must_use]
    pub fn end_of_turn_id(&self) -> i32 {
        self.end_of_turn_id
    }

    /// Whether the template prints the date.
    #[must_use]
    pub fn uses_date(&self) -> bool {
        self.template.uses_date()
    }

    /// What decides the ids: hashes of tokenizer, template and variables, the placeholder, the date if it is printed.
    #[must_use]
    pub fn fingerprint(&self) -> &BTreeMap<String, String> {
        &self.fingerprint
    }

    /// The tokens of a context. A conversation that ends with an assistant's turn is rendered closed, any other with
    /// the generation prompt; a string stands behind the beginning-of-sequence token.
    ///
    /// # Errors
    /// If the context is empty or the template refuses it.
    pub fn context(&self, context: &Context) -> Result<FramedContext> {
        let mut located = None;
        let (text, ids, lead) = match context {
            Context::Text(raw) => self.raw_context(raw)?,
            Context::Messages(messages) => {
                if messages.is_empty() {
                    return Err(Error::value(
                        "empty_context",
                        "the context is an empty list of messages; give at least one",
                    ));
                }
                if let Some(at) = messages.iter().position(|message| message.content.is_empty()) {
                    let what = format!(
                        "the content of message {at} of {} (role {:?}) is empty; give it text, or leave the message out",
                        messages.len(),
                        messages[at].role
                    );
                    return Err(Error::value("empty_context", what));
                }
                let text;
                (text, located) = self.template.join(messages, generation(messages))?;
                let ids = self.tokenizer.encode(&text)?;
                (text, ids, 0)
            }
        };
        if ids.is_empty() {
            return Err(Error::value("empty_context", "the context has no token; give it text"));
        }
        Ok(FramedContext { text, ids, lead, located, source: context.clone() })
    }

    fn raw_context(&self, raw: &str) -> Result<(String, Vec<i32>, usize)> {
        if raw.is_empty() {
            return Err(Error::value("empty_context", "the context is an empty string; give it text"));
        }
        let ids = self.tokenizer.encode(raw)?;
        Ok(match &self.bos {
            Some((bos, id)) => (format!("{bos}{raw}"), [&[*id], ids.as_slice()].concat(), bos.len()),
            None => (raw.to_owned(), ids, 0),
        })
    }

    /// The number of tokens in front of a raw string's own.
    #[must_use]
    pub fn num_lead_tokens(&self, context: &FramedContext) -> usize {
        let bos = self.bos.as_ref().map(|(_, id)| *id);
        usize::from(bos.is_some() && context.ids.first().copied() == bos)
    }

    /// The bytes of `context.text` that each token covers.
    ///
    /// # Errors
    /// If the tokenizer's work cannot be traced.
    pub fn token_spans(&self, context: &FramedContext) -> Result<Vec<ByteSpan>> {
        self.token_spans_until(context, context.text.len())
    }

    /// The spans of the tokens up to the first that begins at or after byte `stop`.
    fn token_spans_until(&self, context: &FramedContext, stop: usize) -> Result<Vec<ByteSpan>> {
        let lead = context.lead;
        if lead == 0 {
            return self.tokenizer.spans_until(&context.text, &context.ids, stop);
        }
        let rest = self.tokenizer.spans_until(&context.text[lead..], &context.ids[1..], stop.saturating_sub(lead))?;
        let first = std::iter::once(ByteSpan { start: 0, end: lead });
        Ok(first.chain(rest.into_iter().map(|span| span.shifted(lead))).collect())
    }

    /// The tokens of `context` that overlap `read`, in order; all of them if there is none.
    ///
    /// # Errors
    /// If a span lies outside its text, or no token is left.
    pub fn readable(&self, context: &FramedContext, read: Option<&[Read]>) -> Result<Vec<i32>> {
        let Some(read) = read else {
            return Ok((0..context.ids.len() as i32).collect());
        };
        let wanted = match &context.source {
            Context::Text(raw) => raw_spans(raw, read, context.lead)?,
            Context::Messages(messages) => self.message_spans(messages, read, context)?,
        };
        // Nothing behind the last wanted byte matters.
        let stop = wanted.iter().map(|span| span.end).max().unwrap_or(0);
        let tokens = self.token_spans_until(context, stop)?;
        // What a template cut whole has no bytes, though it stands inside a token.
        let shown = wanted.into_iter().filter(|span| span.start < span.end);
        let mut chosen: Vec<TokenSpan> = shown.map(|span| overlapping(&tokens, span)).collect();
        chosen.sort_unstable_by_key(|tokens| tokens.start);
        let mut readable = Vec::with_capacity(chosen.iter().map(|tokens| tokens.end - tokens.start).sum());
        let mut next = 0;
        for tokens in chosen {
            readable.extend((tokens.start.max(next)..tokens.end).map(|at| at as i32));
            next = next.max(tokens.end);
        }
        if read.is_empty() {
            return Err(Error::input("\"read\" is an empty list; name at least one span, or leave it out"));
        }
        if readable.is_empty() {
            return Err(Error::input(
                "\"read\" selects no token: the template shows nothing of what it spans (it cuts outer white space); give \
                 spans of shown text, or leave \"read\" out",
            ));
        }
        Ok(readable)
    }

    fn message_spans(&self, messages: &[Message], read: &[Read], context: &FramedContext) -> Result<Vec<ByteSpan>> {
        let text = &context.text;
        let located = self.located(messages, context)?;
        let bos = self.bos.as_ref().map_or("", |(bos, _)| bos.as_str());
        read.iter()
            .map(|read| {
                let number =
                    read.message.ok_or_else(|| Error::input("\"read\" of a list of messages needs \"message\""))?;
                let message = messages.get(number).ok_or_else(|| {
                    Error::input(format!("\"read\" names message {number}, but there are {}", messages.len()))
                })?;
                match (read.start, read.end, read.onwards) {
                    (None, None, false) => located.turn(&self.template, messages, number, bos, text),
                    (None, None, true) => Ok(ByteSpan {
                        start: located.turn_start(&self.template, messages, number, bos)?,
                        end: text.len(),
                    }),
                    (Some(start), Some(end), false) => {
                        let span = char_span(&message.content, start, end, &format!("message {number}"))?;
                        Ok(clip(span, located.cut[number], located.contents[number]))
                    }
                    _ => Err(Error::input(
                        "\"read\" of a message needs \"start\" and \"end\", or neither, or only \"onwards\"",
                    )),
                }
            })
            .collect()
    }

    fn located<'a>(&self, messages: &[Message], context: &'a FramedContext) -> Result<Cow<'a, Located>> {
        match &context.located {
            Some(located) => Ok(Cow::Borrowed(located)),
            None => Located::new(&self.template, messages, generation(messages), &context.text).map(Cow::Owned),
        }
    }

    /// The tokens of each content of `role` that says something; none of a string.
    pub(crate) fn contents(&self, context: &FramedContext, role: &str) -> Result<Vec<TokenSpan>> {
        let Context::Messages(messages) = &context.source else { return Ok(Vec::new()) };
        let said = |message: &Message| message.role == role && !message.content.trim().is_empty();
        if !messages.iter().any(said) {
            return Ok(Vec::new());
        }
        let located = self.located(messages, context)?;
        let shown = messages.iter().zip(&located.contents).filter(|(message, _)| said(message));
        let shown: Vec<ByteSpan> = shown.map(|(_, &span)| span).collect();
        let tokens = self.token_spans_until(context, shown.iter().map(|span| span.end).max().unwrap_or(0))?;
        Ok(shown.into_iter().map(|span| overlapping(&tokens, span)).collect())
    }

    /// The tokens of an oracle prompt: for each of `layers` the line with its number and `num_positions` placeholders,
    /// then the question, as a user's turn with the generation prompt behind it.
    ///
    /// # Errors
    /// If the placeholders do not come out as one token each.
    pub fn prompt(&self, layers: &[usize], num_positions: usize, question: &str) -> Result<FramedPrompt> {
        if layers.is_empty() || num_positions == 0 {
            return Err(Error::input("a prompt needs at least one layer and one position"));
        }
        let mut content = String::new();
        let mut runs = Vec::with_capacity(layers.len());
        for layer in layers {
            content.push_str(&format!("Layer: {layer}\n"));
            runs.push(content.len());
            for _ in 0..num_positions {
                content.push_str(&self.placeholder);
            }
            content.push_str(" \n");
        }
        content.push_str(question);
        let text = self.shape.turn(&self.template, &content)?;
        let ids = self.tokenizer.encode(&text)?;
        let placeholders = self.placeholders(&text, &ids, &runs, num_positions)?;
        Ok(FramedPrompt { text, ids, placeholders })
    }

    /// The indices of the placeholder runs that begin at the bytes `runs` of the turn's content.
    fn placeholders(&self, text: &str, ids: &[i32], runs: &[usize], num_positions: usize) -> Result<Vec<i32>> {
        let width = self.placeholder.len();
        let stop = self.shape.before.len() + runs[runs.len() - 1] + num_positions * width;
        let spans = self.tokenizer.spans_until(text, ids, stop + 1)?;
        let mut found = Vec::with_capacity(runs.len() * num_positions);
        for run in runs {
            let start = self.shape.before.len() + run;
            let first = spans.partition_point(|span| span.end <= start);
            for at in 0..num_positions {
                let expected = ByteSpan { start: start + at * width, end: start + (at + 1) * width };
                let token = first + at;
                if spans.get(token) != Some(&expected) || ids[token] != self.placeholder_id {
                    return Err(Error::input(format!(
                        "the placeholder {:?} is not one token per repetition: repetition {at} of {num_positions} came out \
                         as id {:?}, expected {}; choose another placeholder for this tokenizer",
                        self.placeholder,
                        ids.get(token),
                        self.placeholder_id
                    )));
                }
                found.push(token as i32);
            }
        }
        Ok(found)
    }

    /// The id that the placeholder has in a prompt.
    fn find_placeholder(&self) -> Result<i32> {
        let content = format!("Layer: 0\n{} \nx", self.placeholder);
        let text = self.shape.turn(&self.template, &content)?;
        let ids = self.tokenizer.encode(&text)?;
        let start = self.shape.before.len() + "Layer: 0\n".len();
        let expected = ByteSpan { start, end: start + self.placeholder.len() };
        let spans = self.tokenizer.spans(&text, &ids)?;
        spans.iter().position(|&span| span == expected && !self.placeholder.is_empty()).map(|at| ids[at]).ok_or_else(
            || {
                Error::input(format!(
                    "the placeholder {:?} is not one token in a prompt of this tokenizer; choose another one",
                    self.placeholder
                ))
            },
        )
    }

    /// The tokens of an answer, encoded alone, and the end of the turn.
    ///
    /// # Errors
    /// If the answer is empty.
    pub fn answer(&self, answer: &str) -> Result<Vec<i32>> {
        let mut ids = self.tokenizer.encode(answer)?;
        if ids.is_empty() {
            let what = "the answer is empty: an example without a supervised token; give it text";
            return Err(Error::value("empty_answer", what));
        }
        ids.push(self.end_of_turn_id);
        Ok(ids)
    }
}

fn raw_spans(raw: &str, read: &[Read], lead: usize) -> Result<Vec<ByteSpan>> {
    read.iter()
        .map(|read| match (read.message, read.start, read.end, read.onwards) {
            (None, Some(start), Some(end), false) => Ok(char_span(raw, start, end, "the context")?.shifted(lead)),
            _ => Err(Error::input("\"read\" of a string needs \"start\" and \"end\" and nothing else")),
        })
        .collect()
}

/// The bytes of the code points `start..end` of `text`, which are at least one.
fn char_span(text: &str, start: usize, end: usize, whose: &str) -> Result<ByteSpan> {
    if start == end {
        return Err(Error::input(format!(
            "\"read\" from {start} to {end} of {whose} is empty; \"end\" is one past the last code point that is read"
        )));
    }
    char_bytes(text, CharSpan { start, end }).ok_or_else(|| {
        Error::input(format!(
            "\"read\" from {start} to {end} is outside {whose}, which has {} code points; give 0 <= start < end <= {0}",
            text.chars().count()
        ))
    })
}

/// A span of a content's bytes, moved to where the content stands, less what the template cut.
fn clip(span: ByteSpan, cut: usize, shown: ByteSpan) -> ByteSpan {
    let place = |at: usize| (shown.start + at.saturating_sub(cut)).min(shown.end);
    ByteSpan { start: place(span.start), end: place(span.end) }
}
