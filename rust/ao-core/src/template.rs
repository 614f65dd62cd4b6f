//! Chat templates, rendered to the same text as transformers renders them.
//!
//! The engine is minijinja with what transformers adds to Jinja: trimmed blocks, loop controls, Python's string methods,
//! `raise_exception`, `strftime_now`, a `tojson` that writes like Python, and `{% generation %}`. The date is fixed, or
//! the same data would pack to other bytes tomorrow. `tools` and `documents` stay undefined.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat;

use crate::affine::{Inspections, QUOTED_MARK};
use crate::error::{Error, Result};
use crate::example::Message;
use crate::locate::{Located, MARK, Skeleton};

/// How many sequences of roles are remembered.
const MOST_SKELETONS: usize = 512;

/// The widest indent of `tojson`.
const MOST_INDENT: usize = 64;

/// How many steps a rendering may take. Real templates take some tens for each turn.
const MOST_STEPS: u64 = 20_000_000;

const NAME: &str = "chat_template";

/// One compiled chat template with its variables.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    variables: Value,
    uses_date: bool,
    /// What tells contents apart; `None` where every conversation has to be rendered.
    inspections: Option<Inspections>,
    /// By the roles and whether there is a generation prompt.
    skeletons: RwLock<HashMap<String, Arc<Skeleton>>>,
}

impl Template {
    /// Compile `source`. `variables` are the special tokens and whatever else the template may ask for; `date` is
    /// `YYYY-MM-DD` and is what `strftime_now` tells.
    ///
    /// # Errors
    /// If the template does not compile or the date is not one.
    pub fn new(source: &str, variables: &serde_json::Map<String, serde_json::Value>, date: &str) -> Result<Self> {
        let date = Date::parse(date)?;
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(Error::template)?;
        environment.set_syntax(syntax.clone());
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_filter("trim", |text: &str| text.trim_matches(is_python_space).to_owned());
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| date.format(format));
        let own = without_generation_tags(source);
        let inspections = Inspections::of(&own, syntax);
        environment.add_template_owned(NAME, own).map_err(|error| describe(&error))?;
        Ok(Self {
            environment,
            variables: Value::from(Serde(variables)),
            uses_date: source.contains("strftime_now"),
            inspections,
            skeletons: RwLock::default(),
        })
    }

    /// Whether the template asks for the date.
    #[must_use]
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// The text of a conversation, with the generation prompt behind it if `generation`. Thinking is off.
    ///
    /// # Errors
    /// If the template refuses the conversation.
    pub fn render(&self, messages: &[Message], generation: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        let values = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => generation,
            enable_thinking => false,
            ..self.variables.clone()
        };
        template.render(values).map_err(|error| describe(&error))
    }
}

impl Template {
    /// The same text as [`Template::render`] gives. Where the template cannot tell these contents from others it is joined
    /// from pieces, some twenty times as fast, and then it is known where the contents stand in it.
    ///
    /// # Errors
    /// If the template refuses the conversation.
    pub fn join(&self, messages: &[Message], generation: bool) -> Result<(String, Option<Located>)> {
        if messages.iter().all(|message| self.inert(&message.content))
            // A template that refuses marks is rendered, so that its error is about the conversation.
            && let Ok(skeleton) = self.skeleton(messages, generation)
            && let Some((text, located)) = skeleton.fill(messages)
        {
            return Ok((text, Some(located)));
        }
        Ok((self.render(messages, generation)?, None))
    }

    /// Whether the template does nothing with `content` but show it, its white space perhaps cut, where it does so with
    /// a mark.
    pub(crate) fn inert(&self, content: &str) -> bool {
        self.inspections.as_ref().is_some_and(|inspections| inspections.inert(content))
    }

    /// What stands around the contents of these messages.
    ///
    /// # Errors
    /// If the template refuses them, or does not show each content once, in order.
    pub(crate) fn skeleton(&self, messages: &[Message], generation: bool) -> Result<Arc<Skeleton>> {
        let mut key = String::with_capacity(messages.len() * 10 + 1);
        for message in messages {
            key.push_str(&message.role);
            key.push('\0');
        }
        key.push(if generation { '+' } else { '-' });
        if let Some(known) = self.skeletons.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Arc::clone(known));
        }
        let made = Arc::new(Skeleton::new(self, messages, generation, self.inspections.is_some())?);
        let mut skeletons = self.skeletons.write().unwrap_or_else(PoisonError::into_inner);
        if skeletons.len() >= MOST_SKELETONS {
            skeletons.clear();
        }
        skeletons.insert(key, Arc::clone(&made));
        Ok(made)
    }
}

/// The whole chain of causes on one line; minijinja keeps what the template itself said in the innermost one.
fn describe(error: &minijinja::Error) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    Error::Template(text)
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("the template refuses the conversation: {message}")))
}

/// What `str.strip` and Jinja's `trim` remove: Unicode white space and the four ASCII separators.
pub(crate) fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Python's methods; `strip` and its kin are done here because Python counts four characters more as space.
fn python_method(
    state: &mut minijinja::State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    if args.is_empty()
        && let Some(text) = value.as_str()
    {
        match method {
            "strip" => return Ok(Value::from(text.trim_matches(is_python_space))),
            "lstrip" => return Ok(Value::from(text.trim_start_matches(is_python_space))),
            "rstrip" => return Ok(Value::from(text.trim_end_matches(is_python_space))),
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

/// `json.dumps(value, ensure_ascii=False)` with the arguments that transformers passes on.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands its arguments over")]
fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = serde_json::to_value(value).map_err(failed)?;
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > MOST_INDENT) {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: the indent must be at most {MOST_INDENT}, got {}", indent.unwrap_or_default()),
        ));
    }
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let mut out = String::new();
    let style = PythonJson { item, key, indent };
    style.write(&json, 0, &mut out);
    if out.contains(MARK) {
        out.insert(0, QUOTED_MARK);
    }
    Ok(Value::from_safe_string(out))
}

/// How Python lays out JSON.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
}

impl PythonJson {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    self.separate(at, depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.newline(depth, out);
                out.push(']');
            }
            serde_json::Value::Object(map) if !map.is_empty() => {
                out.push('{');
                for (at, (key, entry)) in map.iter().enumerate() {
                    self.separate(at, depth + 1, out);
                    out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                    out.push_str(&self.key);
                    self.write(entry, depth + 1, out);
                }
                self.newline(depth, out);
                out.push('}');
            }
            scalar => out.push_str(&scalar.to_string()),
        }
    }

    fn separate(&self, at: usize, depth: usize, out: &mut String) {
        if at > 0 {
            out.push_str(&self.item);
        }
        self.newline(depth, out);
    }

    fn newline(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

/// `{% generation %}` marks assistant text for transformers' masks and is no Jinja: a block that is always shown.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        // The closing mark begins behind the opening one: of `{%}` there is none.
        let Some(length) = rest[open + 2..].find("%}") else { break };
        let close = open + 2 + length;
        let tag = &rest[open + 2..close];
        let (before, word, after) = split_tag(tag);
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..open]);
        match replacement {
            Some(word) => out.push_str(&format!("{{%{before} {word} {after}%}}")),
            None => out.push_str(&rest[open..close + 2]),
        }
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

/// The whitespace marks of a tag and what stands between them.
fn split_tag(tag: &str) -> (&str, &str, &str) {
    let is_mark = |mark: char| mark == '-' || mark == '+';
    let start = usize::from(tag.starts_with(is_mark));
    let end = tag.len() - usize::from(tag.len() > start && tag.ends_with(is_mark));
    (&tag[..start], tag[start..end].trim(), &tag[end..])
}

/// A calendar day, for `strftime_now`.
#[derive(Debug, Clone, Copy)]
struct Date {
    year: u32,
    month: u32,
    day: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    fn parse(text: &str) -> Result<Self> {
        let parts: Vec<u32> = text.split('-').filter_map(|part| part.parse().ok()).collect();
        match parts[..] {
            [year, month, day]
                if text.len() == 10
                    && year > 0
                    && (1..=12).contains(&month)
                    && (1..=days_in(year, month)).contains(&day) =>
            {
                Ok(Self { year, month, day })
            }
            _ => Err(Error::input(format!("the date must be a day as YYYY-MM-DD, got {text:?}"))),
        }
    }

    fn day_of_year(self) -> u32 {
        (1..self.month).map(|month| days_in(self.year, month)).sum::<u32>() + self.day
    }

    fn weekday(self) -> usize {
        let before = self.year - 1;
        ((before + before / 4 - before / 100 + before / 400 + self.day_of_year()) % 7) as usize
    }

    /// `datetime.strftime` at midnight, for the directives that templates use.
    fn format(self, format: &str) -> Result<String, minijinja::Error> {
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                out.push(letter);
                continue;
            }
            let mut directive = letters.next();
            let unpadded = directive == Some('-');
            if unpadded {
                directive = letters.next();
            }
            let shown = directive.and_then(|directive| self.directive(directive)).ok_or_else(|| {
                minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: the format {format:?} has a directive that is not supported"),
                )
            })?;
            let cut = if unpadded { shown.trim_start_matches('0') } else { &shown };
            out.push_str(if cut.is_empty() { "0" } else { cut });
        }
        Ok(out)
    }

    fn directive(self, directive: char) -> Option<String> {
        let month = MONTHS[self.month as usize - 1];
        let weekday = WEEKDAYS[self.weekday()];
        Some(match directive {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'j' => format!("{:03}", self.day_of_year()),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'F' => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            'H' | 'M' | 'S' => "00".to_owned(),
            'I' => "12".to_owned(),
            'p' => "AM".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

fn days_in(year: u32, month: u32) -> u32 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}
