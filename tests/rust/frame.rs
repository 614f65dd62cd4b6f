//! Framing: prompts, contexts and answers, against the template's own rendering.

#![allow(clippy::unwrap_used, clippy::format_collect, reason = "a test stops where it fails")]

mod cases;
mod common;

use ao_core::error::Error;
use ao_core::example::{Context, Message, Read};
use ao_core::frame::{FramedContext, Framer};
use ao_core::template::Template;
use proptest::prelude::*;
use serde_json::json;

fn messages(turns: &[(&str, &str)]) -> Context {
    let message = |&(role, content): &(&str, &str)| Message { role: role.to_owned(), content: content.to_owned() };
    Context::Messages(turns.iter().map(message).collect())
}

fn read(message: Option<usize>, range: Option<(usize, usize)>, onwards: bool) -> Read {
    Read { message, start: range.map(|(start, _)| start), end: range.map(|(_, end)| end), onwards }
}

/// The text that the readable tokens of `read` cover, token by token.
fn covered(framer: &Framer, context: &FramedContext, read: &[Read]) -> Vec<String> {
    let spans = framer.token_spans(context).unwrap();
    let tokens = framer.readable(context, Some(read)).unwrap();
    tokens.iter().map(|&at| context.text[spans[at as usize].start..spans[at as usize].end].to_owned()).collect()
}

fn template(name: &str) -> Template {
    let specials = json!({"bos_token": "<bos>", "eos_token": "<eos>"});
    Template::new(&common::read(name), specials.as_object().unwrap(), "2025-01-01").unwrap()
}

#[test]
fn placeholders_survive_odd_questions() {
    let cases = [(common::gemma(), template("gemma.jinja")), (common::qwen(), template("qwen.jinja"))];
    let pieces = [
        " ?",
        "?",
        " ? ?",
        "Layer: 3\n",
        "\n",
        " ",
        "  ",
        "<|turn>",
        "<turn|>",
        "<|im_end|>",
        "{{ x }}",
        "{% if %}",
        "e\u{301}",
        "\u{1f600}",
        "</think>",
        "word",
        "<note>",
        "\t",
    ];
    let question =
        prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..10).prop_map(|pieces| pieces.concat());
    let layers = prop::collection::vec(0usize..80, 1..4);
    proptest!(cases::cases(256), |(question in question, layers in layers, count in 1usize..9)| {
        for (framer, template) in &cases {
            let prompt = framer.prompt(&layers, count, &question).unwrap();
            let lines: String = layers.iter().map(|layer| format!("Layer: {layer}\n{} \n", " ?".repeat(count))).collect();
            let turn = Message { role: "user".to_owned(), content: lines + &question };
            prop_assert_eq!(&prompt.text, &template.render(&[turn], true).unwrap());
            prop_assert_eq!(&prompt.ids, &framer.tokenizer().encode(&prompt.text).unwrap());
            prop_assert_eq!(prompt.placeholders.len(), layers.len() * count);
            // The question cannot hold an earlier run, so the first tokens of the right id are the placeholders.
            let first: Vec<i32> = (0..).zip(&prompt.ids).filter(|(_, id)| **id == framer.placeholder_id())
                .map(|(at, _)| at).take(prompt.placeholders.len()).collect();
            prop_assert_eq!(&prompt.placeholders, &first);
        }
    });
}

#[test]
fn a_prompt_ends_as_generation_begins() {
    let framer = common::gemma();
    let prompt = framer.prompt(&[5], 2, "Is it? ").unwrap();
    let expected = "<bos><|turn>user\nLayer: 5\n ? ? \nIs it?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>";
    assert_eq!(prompt.text, expected);
    let answer = framer.answer("Yes").unwrap();
    assert_eq!(framer.tokenizer().decode(&answer).unwrap(), "Yes<turn|>");
    assert_eq!(answer.last(), Some(&framer.end_of_turn_id()));
}

#[test]
fn an_empty_answer_is_refused() {
    let error = common::gemma().answer("").unwrap_err().to_string();
    assert!(error.contains("without a supervised token"), "{error}");
}

#[test]
fn a_conversation_is_open_unless_the_assistant_spoke_last() {
    let framer = common::gemma();
    let open = framer.context(&messages(&[("system", "s"), ("user", "u")])).unwrap();
    assert!(open.text.ends_with("<|turn>model\n<|channel>thought\n<channel|>"));
    let closed = framer.context(&messages(&[("user", "u"), ("assistant", "a")])).unwrap();
    assert!(closed.text.ends_with("<|turn>model\na<turn|>\n"));
}

#[test]
fn a_string_stands_behind_the_first_token() {
    let framer = common::gemma();
    let context = framer.context(&Context::Text("the sea".to_owned())).unwrap();
    assert_eq!(context.text, "<bos>the sea");
    assert_eq!(framer.tokenizer().decode(&context.ids).unwrap(), "<bos>the sea");
    assert_eq!(framer.num_lead_tokens(&context), 1);
    assert_eq!(covered(&framer, &context, &[read(None, Some((0, 3)), false)]).concat().trim_end(), "the");
    let bare = common::qwen().context(&Context::Text("the sea".to_owned())).unwrap();
    assert_eq!(bare.text, "the sea");
}

#[test]
fn contents_are_found_by_place_not_by_text() {
    // The user says what the system said, and says markup.
    let framer = common::qwen();
    let turns = [("system", "user"), ("user", "<|im_start|>user\nuser"), ("user", "user")];
    let context = framer.context(&messages(&turns)).unwrap();
    for (number, (_, content)) in turns.iter().enumerate() {
        let whole = read(Some(number), Some((0, content.chars().count())), false);
        assert_eq!(covered(&framer, &context, &[whole]).concat(), *content);
    }
}

#[test]
fn a_cut_content_keeps_its_offsets() {
    let framer = common::gemma();
    let context = framer.context(&messages(&[("user", "  \n kind sea \n")])).unwrap();
    assert_eq!(covered(&framer, &context, &[read(Some(0), Some((4, 8)), false)]).concat().trim(), "kind");
    let error = framer.readable(&context, Some(&[read(Some(0), Some((0, 2)), false)])).unwrap_err().to_string();
    assert!(error.contains("selects no token"), "{error}");
}

#[test]
fn turns_have_their_markup() {
    let framer = common::gemma();
    let context = framer.context(&messages(&[("system", "s s"), ("user", "u u"), ("assistant", "a a")])).unwrap();
    let turn = |number| covered(&framer, &context, &[read(Some(number), None, false)]).concat();
    assert_eq!(turn(0), "<|turn>system\ns s<turn|>\n");
    assert_eq!(turn(1), "<|turn>user\nu u<turn|>\n");
    assert_eq!(turn(2), "<|turn>model\na a<turn|>\n");
    let onwards = covered(&framer, &context, &[read(Some(1), None, true)]).concat();
    assert_eq!(onwards, "<|turn>user\nu u<turn|>\n<|turn>model\na a<turn|>\n");
    let open = framer.context(&messages(&[("user", "u u")])).unwrap();
    assert_eq!(covered(&framer, &open, &[read(Some(0), None, false)]).concat(), "<|turn>user\nu u<turn|>\n");
}

#[test]
fn a_turn_behind_a_lone_system_message_is_found_where_that_is_refused() {
    let source = common::read("qwen.jinja");
    let refusing = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}\
                    {{ raise_exception('No user query found') }}{% endif %}";
    let specials = json!({"eos_token": "<|im_end|>"}).to_string();
    let template = format!("{refusing}{source}");
    let framer = Framer::new(&common::read("qwen.json"), &template, &specials, " ?", "2025-01-01").unwrap();
    let context = framer.context(&messages(&[("system", "s"), ("user", "u")])).unwrap();
    let onwards = covered(&framer, &context, &[read(Some(1), None, true)]).concat();
    assert_eq!(onwards, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
}

#[test]
fn what_a_template_rewrites_is_not_located() {
    let framer = common::qwen();
    let turns = messages(&[("user", "u"), ("assistant", "<think>\nno\n</think>\n\nyes"), ("user", "v")]);
    let context = framer.context(&turns).unwrap();
    assert!(!context.text.contains("<think>\nno"));
    let error = framer.readable(&context, Some(&[read(Some(2), Some((0, 1)), false)])).unwrap_err().to_string();
    assert!(error.contains("leave \"read\" out"), "{error}");
    assert_eq!(framer.readable(&context, None).unwrap().len(), context.ids.len());
}

#[test]
fn wrong_spans_are_refused() {
    let framer = common::gemma();
    let text = framer.context(&Context::Text("sea".to_owned())).unwrap();
    let chat = framer.context(&messages(&[("user", "sea")])).unwrap();
    let cases = [
        (&text, read(None, Some((0, 4)), false), "outside the context, which has 3"),
        (&text, read(None, Some((2, 1)), false), "outside the context"),
        (&text, read(Some(0), None, false), "of a string"),
        (&chat, read(None, Some((0, 1)), false), "needs \"message\""),
        (&chat, read(Some(1), None, false), "names message 1, but there are 1"),
        (&chat, read(Some(0), Some((0, 9)), false), "outside message 0"),
        (&chat, Read { message: Some(0), start: Some(0), end: None, onwards: false }, "or neither"),
        (&chat, read(Some(0), Some((1, 1)), false), "from 1 to 1 of message 0 is empty"),
        (&text, read(None, Some((0, 0)), false), "from 0 to 0 of the context is empty"),
    ];
    for (context, read, what) in cases {
        let error = framer.readable(context, Some(&[read])).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not contain {what}");
    }
}

#[test]
fn empty_contexts_are_refused() {
    let framer = common::gemma();
    let contexts = [
        Context::Text(String::new()),
        Context::Messages(Vec::new()),
        messages(&[("system", "s"), ("user", "")]),
        messages(&[("user", "u"), ("assistant", "")]),
    ];
    for context in contexts {
        let error = framer.context(&context).unwrap_err().to_string();
        assert!(error.contains("empty"), "{error}");
    }
}

#[test]
fn unusable_parts_are_refused() {
    let (tokenizer, template) = (common::read("gemma.json"), common::read("gemma.jinja"));
    let specials = r#"{"bos_token": "<bos>", "eos_token": "<eos>"}"#;
    let build = |tokenizer: &str, template: &str, specials: &str, placeholder: &str, date: &str| {
        Framer::new(tokenizer, template, specials, placeholder, date).err().expect("it must be refused")
    };
    let cases: [(Error, &str); 8] = [
        (build("{}", &template, specials, " ?", "2025-01-01"), "no `model`"),
        (build(&tokenizer, "{% if %}", specials, " ?", "2025-01-01"), "syntax error"),
        (
            build(&tokenizer, "{{ raise_exception('no') }}", specials, " ?", "2025-01-01"),
            "refuses the conversation: no",
        ),
        (build(&tokenizer, "nothing", specials, " ?", "2025-01-01"), "exactly once"),
        (build(&tokenizer, "{{ messages[0].content | upper }}", specials, " ?", "2025-01-01"), "more than its outer"),
        (build(&tokenizer, &template, r#"{"bos_token": "two tokens"}"#, " ?", "2025-01-01"), "must be one token"),
        (build(&tokenizer, &template, specials, " ?!", "2025-01-01"), "choose another"),
        (build(&tokenizer, &template, specials, " ?", "2025-02-30"), "YYYY-MM-DD"),
    ];
    for (error, what) in cases {
        assert!(error.to_string().contains(what), "{error} does not contain {what}");
    }
}

#[test]
fn the_fingerprint_tells_what_decides_the_ids() {
    let (tokenizer, template) = (common::read("gemma.json"), common::read("gemma.jinja"));
    let specials = r#"{"bos_token":"<bos>","eos_token":"<eos>"}"#;
    let of = |tokenizer: &str, template: &str, date: &str| {
        Framer::new(tokenizer, template, specials, " ?", date).unwrap().fingerprint().clone()
    };
    let own = of(&tokenizer, &template, "2025-01-01");
    // Layout, truncation and an unused date decide nothing.
    let mut other: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
    other["truncation"] = json!({"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    assert_eq!(own, of(&serde_json::to_string_pretty(&other).unwrap(), &template, "2026-01-01"));
    let dated = template.replace("{{- bos_token -}}", "{{- bos_token -}}{{ strftime_now('%d %b %Y') }}");
    assert_ne!(own["template"], of(&tokenizer, &dated, "2025-01-01")["template"]);
    assert_eq!(of(&tokenizer, &dated, "2026-01-01")["date"], "2026-01-01");
}

#[test]
fn the_date_is_the_one_that_was_given() {
    let template = Template::new(
        "{{ strftime_now('%d %b %Y, %A %B %-d, day %j, %m/%y %H:%M%%') }}",
        &serde_json::Map::new(),
        "2024-02-29",
    );
    assert_eq!(
        template.unwrap().render(&[], false).unwrap(),
        "29 Feb 2024, Thursday February 29, day 060, 02/24 00:00%"
    );
}

fn qwen_with(change: impl Fn(&mut serde_json::Value)) -> ao_core::Result<Framer> {
    let mut tokenizer: serde_json::Value = serde_json::from_str(&common::read("qwen.json")).unwrap();
    change(&mut tokenizer);
    let specials = json!({"eos_token": "<|im_end|>"}).to_string();
    Framer::new(&tokenizer.to_string(), &common::read("qwen.jinja"), &specials, " ?", "2025-01-01")
}

#[test]
fn the_engine_is_proved() {
    for framer in [common::gemma(), common::qwen()] {
        assert!(framer.engine().starts_with("tokenizers 1.0.0-rc.3, equal to 0.23.2 in ids"), "{}", framer.engine());
    }
}

#[test]
fn the_older_tokenizer_encodes_where_the_engine_fails() {
    // The engine looks for the next such token from inside the first one's bytes, and panics.
    let framer = qwen_with(|root| {
        let id =
            root["added_tokens"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).max().unwrap();
        root["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id + 1, "content": "\u{4f60}", "single_word": true, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        }));
    })
    .unwrap();
    assert!(framer.engine().starts_with("tokenizers 0.23.2, because of 1.0.0-rc.3: "), "{}", framer.engine());
    let text = "the sea \u{4f60} na\u{ef}ve \u{4f60}\u{4f60} \u{1f600}";
    let context = framer.context(&Context::Text(text.to_owned())).unwrap();
    assert_eq!(framer.tokenizer().decode(&context.ids).unwrap(), text);
    assert_eq!(covered(&framer, &context, &[read(None, Some((4, 9)), false)]).concat().trim(), "sea \u{4f60}");
    let prompt = framer.prompt(&[3, 7], 4, "What ? ? is\n\nthis").unwrap();
    assert!(prompt.placeholders.iter().all(|&at| prompt.ids[at as usize] == framer.placeholder_id()));
    assert_eq!(prompt.ids, common::qwen().prompt(&[3, 7], 4, "What ? ? is\n\nthis").unwrap().ids);
}

#[test]
fn a_split_pattern_that_gives_up_is_an_error() {
    let framer = qwen_with(|root| {
        let splitter = &mut root["pre_tokenizer"]["pretokenizers"][0];
        assert!(splitter["pattern"]["Regex"].is_string());
        splitter["pattern"] = json!({"Regex": "(?:a(?=.?)|a(?=.?))+c|[^a]+|a"});
    })
    .unwrap();
    assert!(framer.tokenizer().encode("banana").is_ok());
    let error = framer.tokenizer().encode(&format!("b{}d", "a".repeat(60))).unwrap_err().to_string();
    assert!(error.contains("gives up on a text of 62 bytes"), "{error}");
}

#[test]
fn read_spans_are_covered_in_any_script() {
    let framers = [common::gemma(), common::qwen()];
    let text = prop::collection::vec(
        prop_oneof![
            any::<char>(),
            prop::char::range(' ', '~'),
            prop::char::range('\u{300}', '\u{36f}'),
            prop::char::range('\u{400}', '\u{6ff}'),
            prop::char::range('\u{900}', '\u{e7f}'),
            prop::char::range('\u{1100}', '\u{11ff}'),
            prop::char::range('\u{4e00}', '\u{4fff}'),
            prop::char::range('\u{1f300}', '\u{1f6ff}'),
            Just(' '),
            Just('\n'),
        ],
        1..60,
    );
    proptest!(cases::cases(300), |(letters in text, from in 0usize..60, length in 1usize..20)| {
        let text: String = letters.iter().collect();
        let start = from % letters.len();
        let end = (start + length).min(letters.len());
        let wanted: String = letters[start..end].iter().collect();
        for framer in &framers {
            let context = framer.context(&Context::Text(text.clone())).unwrap();
            let spans = framer.token_spans(&context).unwrap();
            let tokens = framer.readable(&context, Some(&[read(None, Some((start, end)), false)])).unwrap();
            let (first, last) = (spans[tokens[0] as usize], spans[*tokens.last().unwrap() as usize]);
            // The tokens hold what was asked for, and none of them only what was not.
            let before = context.text.len() - text.len() + letters[..start].iter().map(|c| c.len_utf8()).sum::<usize>();
            prop_assert!(first.start <= before && last.end >= before + wanted.len());
            prop_assert!(first.end > before && last.start < before + wanted.len());
            prop_assert_eq!(tokens.len() as i32, tokens[tokens.len() - 1] - tokens[0] + 1);
        }
    });
}

/// What of the content of message `number` is shown: where it begins in the content and in the text, and where it ends
/// there. Told by what stands around another content in its place; `None` if that is not there or does not tell.
fn shown(template: &Template, turns: &[Message], number: usize, text: &str) -> Option<(usize, usize, usize)> {
    let mut marked = turns.to_vec();
    "QZQ".clone_into(&mut marked[number].content);
    let rendered = template.render(&marked, turns.last()?.role != "assistant").ok()?;
    let (before, behind) = rendered.split_once("QZQ").filter(|(_, behind)| !behind.contains("QZQ"))?;
    let shown = text.strip_prefix(before)?.strip_suffix(behind)?;
    let mut places = turns[number].content.match_indices(shown);
    let (at, _) = places.next().filter(|_| !shown.is_empty() && places.next().is_none())?;
    Some((at, before.len(), before.len() + shown.len()))
}

#[test]
fn read_spans_of_messages_are_what_is_shown_of_them() {
    let tests = common::golden("../python/templates");
    let names =
        ["gemma_2", "gemma_3", "gemma_4", "llama_2", "llama_3", "mistral", "qwen_3", "zephyr", "chatml", "deepseek"];
    let specials = json!({"bos_token": "<bos>", "eos_token": "<turn|>"});
    let framers: Vec<(Framer, Template)> = names
        .iter()
        .map(|name| std::fs::read_to_string(tests.join(format!("{name}.jinja"))).unwrap())
        .map(|source| {
            let framer = Framer::new(&common::read("gemma.json"), &source, &specials.to_string(), " ?", "2025-01-01");
            (framer.unwrap(), Template::new(&source, specials.as_object().unwrap(), "2025-01-01").unwrap())
        })
        .collect();
    let pieces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "a",
        "word",
        "?",
        " ?",
        "</think>",
        "<think>\n",
        "<turn|>",
        "[INST]",
        "[/INST]",
        "e\u{301}",
        "\u{1f600}",
        "\u{4f60}",
        "\u{a0}",
        "\u{1c}",
        "\u{200b}",
        "{{ x }}",
        "user",
        "\u{2028}",
    ];
    let text = prop::collection::vec(prop::sample::select(pieces.to_vec()), 1..8).prop_map(|pieces| pieces.concat());
    let contents = prop::collection::vec(text, 1..5);
    let told = std::cell::Cell::new([0, 0]);
    proptest!(cases::cases(300), |(contents in contents, which in 0..names.len(), at in any::<[prop::sample::Index; 3]>())| {
        let (framer, template) = &framers[which];
        let roles = ["user", "assistant"];
        let turns: Vec<Message> = contents.iter().enumerate()
            .map(|(at, content)| Message { role: roles[at % 2].to_owned(), content: content.clone() }).collect();
        let number = at[0].index(turns.len());
        let letters: Vec<usize> = turns[number].content.char_indices().map(|(at, _)| at).chain([turns[number].content.len()]).collect();
        let start = at[1].index(letters.len() - 1);
        let end = start + 1 + at[2].index(letters.len() - 1 - start);
        let Ok(context) = framer.context(&Context::Messages(turns.clone())) else { return Ok(()) };
        let Some((cut, first, last)) = shown(template, &turns, number, &context.text) else { return Ok(()) };
        let place = |at: usize| (first + at.saturating_sub(cut)).min(last);
        let (from, to) = (place(letters[start]), place(letters[end]));
        let overlap = |token: &ao_core::span::ByteSpan| from < to && token.start < to && token.end > from;
        let spans = framer.token_spans(&context).unwrap();
        let expected: Vec<i32> = (0..).zip(&spans).filter(|(_, token)| overlap(token)).map(|(at, _)| at).collect();
        let found = framer.readable(&context, Some(&[read(Some(number), Some((start, end)), false)]));
        let [some, none] = told.get();
        match found {
            Ok(found) => prop_assert_eq!(found, expected, "{}: {:?}", names[which], turns),
            Err(error) => prop_assert!(
                expected.is_empty() && error.to_string().contains("selects no token")
                    || error.to_string().contains("are not known"),
                "{}: {:?} {}", names[which], turns, error
            ),
        }
        told.set(if from < to { [some + 1, none] } else { [some, none + 1] });
    });
    let [some, none] = told.get();
    assert!(some > 100 && none > 3, "spans of something and of what is cut: {some} {none}");
}

#[test]
fn what_is_cut_whole_selects_no_token() {
    let source = std::fs::read_to_string(common::golden("../python/templates/llama_2.jinja")).unwrap();
    let specials = json!({"bos_token": "<bos>", "eos_token": "<turn|>"}).to_string();
    let framer = Framer::new(&common::read("gemma.json"), &source, &specials, " ?", "2025-01-01").unwrap();
    for content in ["the sea  ", "  the sea", "\n\nthe sea \n"] {
        let context = framer.context(&messages(&[("user", content)])).unwrap();
        let at = if content.starts_with('t') { content.len() - 1 } else { 0 };
        let error =
            framer.readable(&context, Some(&[read(Some(0), Some((at, at + 1)), false)])).unwrap_err().to_string();
        assert!(error.contains("selects no token"), "{content:?} {error}");
    }
}

#[test]
fn nothing_panics_on_what_is_no_tokenizer_and_no_template() {
    let tokenizer: serde_json::Value = serde_json::from_str(&common::read("qwen.json")).unwrap();
    let source = common::read("gemma.jinja");
    let paths = [
        "/model",
        "/model/vocab",
        "/model/merges",
        "/model/type",
        "/model/unk_token",
        "/model/byte_fallback",
        "/pre_tokenizer",
        "/pre_tokenizer/type",
        "/pre_tokenizer/pretokenizers",
        "/pre_tokenizer/pretokenizers/0/pattern",
        "/pre_tokenizer/pretokenizers/0/behavior",
        "/normalizer",
        "/normalizer/type",
        "/decoder",
        "/decoder/type",
        "/added_tokens",
        "/added_tokens/0",
        "/added_tokens/0/id",
        "/added_tokens/0/content",
        "/post_processor",
    ];
    let values = [
        json!(null),
        json!(-1),
        json!(4_294_967_295_u64),
        json!(""),
        json!("x"),
        json!([]),
        json!({}),
        json!([[1]]),
        json!({"Regex": "("}),
        json!(true),
        json!({"a": 0}),
        json!(["a b"]),
    ];
    let change = (prop::sample::select(paths.to_vec()), prop::sample::select(values.to_vec()));
    let cut = prop::collection::vec((0..source.len(), "[{}%|'a-z ()\\[\\]~+=.-]{0,4}"), 0..4);
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |((path, value) in change, cuts in cut)| {
        let mut changed = tokenizer.clone();
        if let Some(place) = changed.pointer_mut(path) {
            *place = value;
        }
        let mut template = source.clone();
        for (at, put) in cuts {
            let at = at.min(template.len());
            if template.is_char_boundary(at) {
                template.insert_str(at, &put);
            }
        }
        let specials = r#"{"bos_token": null, "eos_token": "<|im_end|>"}"#;
        let whole = tokenizer.to_string();
        for (tokenizer, template) in [(changed.to_string(), &source), (whole, &template)] {
            let Ok(framer) = Framer::new(&tokenizer, template, specials, " ?", "2025-01-01") else { continue };
            let context = framer.context(&messages(&[("user", "e\u{301} \u{1f600}<|im_end|>  x\n"), ("assistant", " y ")]));
            if let Ok(context) = context {
                let _ = framer.readable(&context, Some(&[read(Some(0), Some((0, 3)), false), read(Some(1), None, false)]));
                let _ = framer.tokenizer().decode(&context.ids);
            }
            let _ = framer.prompt(&[1], 2, "{{ x }} ? <|im_end|>");
        }
    });
}
