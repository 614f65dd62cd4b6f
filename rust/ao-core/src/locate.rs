//! Where each message's content and each turn stands in a rendered conversation.
//!
//! Content is never searched for: it may repeat, or read like markup. The conversation is rendered once more with a
//! private-use mark in place of each content; the pieces between the marks, joined with the real contents (or with
//! their white space cut, as many templates do), must spell the real rendering, else nothing is told.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use crate::affine::QUOTED_MARK;
use crate::error::{Error, Result};
use crate::example::Message;
use crate::span::ByteSpan;
use crate::template::{Template, is_python_space};

/// What stands where in the rendered text of a conversation.
#[derive(Debug, Clone)]
pub struct Located {
    /// Each message's content as rendered, its white space cut where the template cuts it.
    pub contents: Vec<ByteSpan>,
    /// For each content, how many bytes the template cut from its start.
    pub cut: Vec<usize>,
    skeleton: Arc<Skeleton>,
}

/// What a template makes of a sequence of roles, whatever the contents.
#[derive(Debug)]
pub(crate) struct Skeleton {
    /// The pieces between the contents, one more than there are contents.
    pub(crate) pieces: Vec<String>,
    /// What is cut from the start and the end of each content, where that is known for every inert one.
    pub(crate) cuts: Option<Vec<[Cut; 2]>>,
    /// For each turn but the first, and for the end, the length of the footer before it, once it was asked for.
    footers: Vec<OnceLock<Option<usize>>>,
}

/// What a template cuts from one side of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    Nothing,
    LineEnds,
    Space,
}

impl Cut {
    fn takes(self, character: char) -> bool {
        match self {
            Self::Nothing => false,
            Self::LineEnds => character == '\n',
            Self::Space => is_python_space(character),
        }
    }

    pub(crate) fn start(self, content: &str) -> &str {
        content.trim_start_matches(|character| self.takes(character))
    }

    pub(crate) fn end(self, content: &str) -> &str {
        content.trim_end_matches(|character| self.takes(character))
    }
}

impl Skeleton {
    /// Render `messages` with marks for contents. `affine`: all inert contents take the same way as the marks.
    pub(crate) fn new(template: &Template, messages: &[Message], generation: bool, affine: bool) -> Result<Self> {
        let count = messages.len();
        let pieces = split_at_marks(&template.render(&marked(messages), generation)?, count)
            .ok_or_else(|| refused("shows a message not at all, twice or out of order"))?;
        let quotes = pieces.iter().any(|piece| piece.contains(QUOTED_MARK));
        let cuts = if affine && !quotes { cuts(template, messages, generation, &pieces) } else { None };
        Ok(Self { pieces, cuts, footers: (0..=count).map(|_| OnceLock::new()).collect() })
    }

    /// The rendering of inert contents, and where they stand in it.
    pub(crate) fn fill(self: &Arc<Self>, messages: &[Message]) -> Option<(String, Located)> {
        let cuts = self.cuts.as_deref()?;
        let length = |parts: &mut dyn Iterator<Item = usize>| parts.sum::<usize>();
        let most = length(&mut self.pieces.iter().map(String::len))
            + length(&mut messages.iter().map(|message| message.content.len()));
        let mut text = String::with_capacity(most);
        let (mut contents, mut cut) = (Vec::with_capacity(messages.len()), Vec::with_capacity(messages.len()));
        for ((message, piece), &[before, behind]) in messages.iter().zip(&self.pieces).zip(cuts) {
            text.push_str(piece);
            let kept = before.start(&message.content);
            let start = text.len();
            text.push_str(behind.end(kept));
            contents.push(ByteSpan { start, end: text.len() });
            cut.push(message.content.len() - kept.len());
        }
        text.push_str(self.pieces.last()?);
        Some((text, Located { contents, cut, skeleton: Arc::clone(self) }))
    }
}

/// What is cut from each content, told by marks with white space on one side at a time.
fn cuts(template: &Template, messages: &[Message], generation: bool, pieces: &[String]) -> Option<Vec<[Cut; 2]>> {
    let shown = |before: &str, behind: &str| {
        let mut messages = marked(messages);
        for message in &mut messages {
            message.content = [before, &message.content, behind].concat();
        }
        split_at_marks(&template.render(&messages, generation).ok()?, messages.len())
    };
    let cut = |kept_line_end: bool, kept_space: bool| match (kept_line_end, kept_space) {
        (true, true) => Some(Cut::Nothing),
        (false, true) => Some(Cut::LineEnds),
        (false, false) => Some(Cut::Space),
        (true, false) => None,
    };
    let [line_end_before, space_before, line_end_behind, space_behind] =
        [("\n", ""), (" ", ""), ("", "\n"), ("", " ")].map(|(before, behind)| shown(before, behind));
    let (line_end_before, space_before) = (line_end_before?, space_before?);
    let (line_end_behind, space_behind) = (line_end_behind?, space_behind?);
    (0..messages.len())
        .map(|at| {
            let before = [(&line_end_before, "\n"), (&space_before, " ")]
                .map(|(shown, space)| whether(&shown[at], &pieces[at], &[&pieces[at], space].concat()));
            let behind = [(&line_end_behind, "\n"), (&space_behind, " ")]
                .map(|(shown, space)| whether(&shown[at + 1], &pieces[at + 1], &[space, &pieces[at + 1]].concat()));
            Some([cut(before[0]?, before[1]?)?, cut(behind[0]?, behind[1]?)?])
        })
        .collect()
}

/// Whether `shown` is `kept` (and not `cut`); `None` if it is neither.
fn whether(shown: &str, cut: &str, kept: &str) -> Option<bool> {
    if shown == kept { Some(true) } else { (shown == cut).then_some(false) }
}

/// What every mark begins with.
pub(crate) const MARK: char = '\u{ff6fe}';

/// A mark that no text holds: the number of a message in private-use characters, fenced so that none contains another.
pub(crate) fn mark(number: usize) -> String {
    let digits = number.to_string();
    let digits = digits.bytes().map(|digit| char::from_u32(0xF_F700 + u32::from(digit)).expect("private use"));
    std::iter::once(MARK).chain(digits).chain(std::iter::once('\u{ff6ff}')).collect()
}

/// The same conversation with a mark for each content.
pub(crate) fn marked(messages: &[Message]) -> Vec<Message> {
    messages
        .iter()
        .enumerate()
        .map(|(number, message)| Message { role: message.role.clone(), content: mark(number) })
        .collect()
}

/// Cut `text` at the marks of `count` messages, which must stand in order, once each.
pub(crate) fn split_at_marks(text: &str, count: usize) -> Option<Vec<String>> {
    let mut pieces = Vec::with_capacity(count + 1);
    let mut rest = text;
    for number in 0..count {
        let (before, after) = rest.split_once(&mark(number))?;
        pieces.push(before.to_owned());
        rest = after;
    }
    pieces.push(rest.to_owned());
    (!pieces.iter().any(|piece| piece.contains(MARK))).then_some(pieces)
}

impl Located {
    /// Locate the contents of `messages` in `text`, their rendering.
    ///
    /// # Errors
    /// If the template does more with a content than to show it with its white space cut.
    pub fn new(template: &Template, messages: &[Message], generation: bool, text: &str) -> Result<Self> {
        let skeleton = template.skeleton(messages, generation)?;
        let count = messages.len();
        let mut located = Self { contents: Vec::with_capacity(count), cut: Vec::with_capacity(count), skeleton };
        let start = located.skeleton.pieces[0].len();
        if !text.starts_with(&located.skeleton.pieces[0]) || !located.place(messages, text, start) {
            return Err(refused("changes a content by more than its outer white space, or its markup by a content"));
        }
        Ok(located)
    }

    /// Place all contents, of which the first must begin at byte `at`; `false` if they do not spell the text. The longest
    /// form of a content that lets the others fit is taken; what was tried in vain is not tried again.
    fn place(&mut self, messages: &[Message], text: &str, at: usize) -> bool {
        let forms: Vec<Vec<&str>> = messages.iter().map(|message| forms(&message.content)).collect();
        let mut failed: HashSet<(usize, usize)> = HashSet::new();
        // For each content that is placed: where it begins, and which of its forms is to be tried next.
        let mut way: Vec<(usize, usize)> = vec![(at, 0)];
        while let Some(&(at, form)) = way.last() {
            let number = way.len() - 1;
            if number == messages.len() && at == text.len() {
                break;
            }
            let shown = forms.get(number).filter(|_| !failed.contains(&(number, at))).and_then(|forms| forms.get(form));
            let Some(&shown) = shown else {
                failed.insert((number, at));
                way.pop();
                continue;
            };
            way[number].1 += 1;
            let (end, piece) = (at + shown.len(), self.skeleton.pieces.get(number + 1));
            if let Some(piece) = piece
                && text[at..].starts_with(shown)
                && text[end..].starts_with(piece.as_str())
            {
                way.push((end + piece.len(), 0));
            }
        }
        for ((message, forms), &(start, next)) in messages.iter().zip(&forms).zip(&way) {
            let shown = forms[next - 1];
            self.contents.push(ByteSpan { start, end: start + shown.len() });
            self.cut.push(shown.as_ptr() as usize - message.content.as_ptr() as usize);
        }
        !way.is_empty()
    }

    /// The bytes of turn `number`, from its header to the next turn's, which may be the generation prompt.
    ///
    /// # Errors
    /// If the template rewrites earlier turns, so that a turn has no place of its own.
    pub fn turn(
        &self,
        template: &Template,
        messages: &[Message],
        number: usize,
        bos: &str,
        text: &str,
    ) -> Result<ByteSpan> {
        Ok(ByteSpan {
            start: self.turn_start(template, messages, number, bos)?,
            end: if number + 1 == messages.len() {
                let behind = &self.skeleton.footers[number + 1];
                let footer = *behind.get_or_init(|| self.footer_by_prefix(template, messages, number + 1));
                footer.map_or(text.len(), |footer| self.contents[number].end + footer)
            } else {
                self.turn_start(template, messages, number + 1, bos)?
            },
        })
    }

    /// Where the header of turn `number` begins. `bos` is the same in every call for one template.
    pub(crate) fn turn_start(
        &self,
        template: &Template,
        messages: &[Message],
        number: usize,
        bos: &str,
    ) -> Result<usize> {
        if number == 0 {
            return Ok(if self.skeleton.pieces[0].starts_with(bos) { bos.len() } else { 0 });
        }
        let before = &self.skeleton.pieces[number];
        let footer = self.skeleton.footers[number]
            .get_or_init(|| {
                self.footer_by_prefix(template, messages, number)
                    .or_else(|| self.footer_by_suffix(template, messages, number, bos))
            })
            .ok_or_else(|| refused("does not render its turns one behind the other; give \"start\" and \"end\""))?;
        debug_assert!(footer <= before.len());
        Ok(self.contents[number - 1].end + footer)
    }

    /// The length of the footer before turn `number`: what the conversation up to there, rendered alone, ends with.
    fn footer_by_prefix(&self, template: &Template, messages: &[Message], number: usize) -> Option<usize> {
        let alone = template.render(&marked(&messages[..number]), false).ok()?;
        let pieces = split_at_marks(&alone, number)?;
        let footer = pieces.last()?;
        let own = &self.skeleton.pieces;
        (pieces[..number] == own[..number] && own[number].starts_with(footer.as_str())).then_some(footer.len())
    }

    /// The same, from the conversation that begins with that turn: its header must end the piece. For templates that
    /// refuse a conversation without a user's turn.
    fn footer_by_suffix(&self, template: &Template, messages: &[Message], number: usize, bos: &str) -> Option<usize> {
        let alone = template.render(&marked(&messages[number..]), false).ok()?;
        let pieces = split_at_marks(&alone, messages.len() - number)?;
        let header = pieces[0].strip_prefix(bos).unwrap_or(&pieces[0]);
        let piece = &self.skeleton.pieces[number];
        (!header.is_empty() && piece.ends_with(header)).then(|| piece.len() - header.len())
    }
}

/// The forms in which templates show a content, each once.
fn forms(content: &str) -> Vec<&str> {
    let mut forms = vec![
        content,
        content.trim_matches(is_python_space),
        content.trim_start_matches(is_python_space),
        content.trim_end_matches(is_python_space),
        content.trim_start_matches('\n'),
        content.trim_end_matches('\n'),
        content.trim_matches('\n'),
    ];
    forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
    forms.dedup();
    forms
}

fn refused(what: &str) -> Error {
    Error::template(format!(
        "the places of the messages are not known, because the template {what}; leave \"read\" out to read everything"
    ))
}
