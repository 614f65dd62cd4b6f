//! Templates: text that is joined from pieces is the text that rendering gives.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::path::Path;

use ao_core::example::Message;
use ao_core::locate::Located;
use ao_core::template::Template;
use proptest::prelude::*;
use serde_json::json;

fn template(source: &str) -> Template {
    let specials = json!({"bos_token": "<bos>", "eos_token": "<eos>"});
    Template::new(source, specials.as_object().unwrap(), "2025-01-01").unwrap()
}

/// Every template of the test set: its name and its text.
fn sources() -> Vec<(String, String)> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
    let mut paths: Vec<_> = ["python/templates", "golden"]
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(tests.join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jinja"))
        .collect();
    paths.sort();
    let named = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (named(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// What stands in quotes in a template: what it may look for.
fn quoted(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for quote in ['\'', '"'] {
        let pieces = source.split(quote).skip(1).step_by(2);
        found.extend(pieces.map(|piece| piece.replace("\\n", "\n")).filter(|piece| piece.len() < 40));
    }
    found
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

const SHAPES: [&[&str]; 9] = [
    &["user"],
    &["system", "user"],
    &["user", "assistant"],
    &["system", "user", "assistant"],
    &["user", "assistant", "user"],
    &["system", "user", "assistant", "user", "assistant"],
    &["assistant"],
    &["user", "user"],
    &["user", "tool", "developer"],
];

/// Pieces that a template of `source` could trip over, whole and cut in two.
fn trips(source: &str) -> Vec<String> {
    let plain = [
        "word",
        "a",
        " ",
        "\n",
        "\t",
        "\u{a0}",
        "\u{1c}",
        "\u{2003}",
        "caf\u{e9}",
        "\u{1f600}",
        "<",
        "|>",
        "</think>",
        "<think>",
        "{{ x }}",
        "{% if %}",
        "[INST]",
        "<|im_end|>",
        "none",
        "'",
        "\"",
        "\\",
        "0",
        "\u{ff6fe}",
        "\u{ff6ff}",
        "\u{ff6fd}",
    ];
    let mut pieces: Vec<String> = plain.map(str::to_owned).to_vec();
    for found in quoted(source) {
        if let Some((middle, _)) = found.char_indices().nth(found.chars().count() / 2) {
            pieces.extend([found[..middle].to_owned(), found[middle..].to_owned()]);
        }
        pieces.push(found);
    }
    pieces
}

#[test]
fn joined_text_is_the_rendered_text() {
    for (name, source) in sources() {
        let template = template(&source);
        let content =
            prop::collection::vec(prop::sample::select(trips(&source)), 0..6).prop_map(|pieces| pieces.concat());
        let contents = prop::collection::vec(content, 5);
        let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(contents in contents, shape in prop::sample::select(SHAPES.to_vec()), generation: bool)| {
            let messages: Vec<Message> =
                shape.iter().zip(&contents).map(|(role, content)| message(role, content)).collect();
            let rendered = template.render(&messages, generation);
            match template.join(&messages, generation) {
                Ok((text, located)) => {
                    let rendered = rendered.unwrap();
                    prop_assert_eq!(&text, &rendered, "{}", name);
                    if let Some(located) = located {
                        let searched = Located::new(&template, &messages, generation, &text).unwrap();
                        prop_assert_eq!(&located.contents, &searched.contents);
                        prop_assert_eq!(&located.cut, &searched.cut);
                    }
                }
                Err(error) => prop_assert_eq!(error.to_string(), rendered.unwrap_err().to_string()),
            }
        });
    }
}

#[test]
fn the_families_join_plain_contents() {
    for (name, source) in sources() {
        let template = template(&source);
        let turns = [message("user", " How is the weather?\n"), message("assistant", "Fine, isn't it?\n\n")];
        let joins = |messages: &[Message]| template.join(messages, true).unwrap().1.is_some();
        assert!(joins(&turns) && joins(&turns[..1]), "{name}");
        let with_system = [&[message("system", "Be kind.")], &turns[..]].concat();
        // Gemma 2's refuses a system message; Mistral's shows it behind the first user's.
        if !["gemma_2", "mistral"].contains(&name.as_str()) {
            assert!(joins(&with_system), "{name}");
        }
    }
}

#[test]
fn what_a_template_looks_for_is_rendered() {
    let qwen = template(&sources().into_iter().find(|(name, _)| name == "qwen_3").unwrap().1);
    for (content, joined) in [("x", true), ("x</think>", false), ("  ", false), ("", false), ("x<think>", false)] {
        let messages = [message("user", "u"), message("assistant", content)];
        assert_eq!(qwen.join(&messages, false).unwrap().1.is_some(), joined, "{content:?}");
    }
    let compared = template("{% for m in messages %}{{ 'nothing' if m.content == ' no ' else m.content }}{% endfor %}");
    for (content, joined) in [("no", false), (" no ", false), ("\nno", false), ("no!", true)] {
        assert_eq!(compared.join(&[message("user", content)], false).unwrap().1.is_some(), joined, "{content:?}");
    }
}

#[test]
fn what_does_more_than_show_is_rendered() {
    let bodies = [
        "{{ m.content | upper }}",
        "{{ m.content.upper() }}",
        "{{ m.content[0] }}{{ m.content[1:] }}",
        "{{ m.content }}{% if m.content | length > 9 %}long{% endif %}",
        "{{ m.content }}{% if m.content[0] == 'x' %}x{% endif %}",
        "{{ m.content }}{% if m.content > 'm' %}late{% endif %}",
        "{{ m.content }}{% if m.content == m.role %}same{% endif %}",
        "{{ m.content }}{% if m.content in 'some text' %}in{% endif %}",
        "{{ m.content }}{% if '>x' in '<' + m.content %}in{% endif %}",
        "{{ m.content }}{% if m.content is in(['a', 'b']) %}in{% endif %}",
        "{{ m.content }}{% if m.content is startingwith('x') %}x{% endif %}",
        "{% for letter in m.content %}{{ letter }}{% endfor %}",
        "{{ m.content | tojson }}",
        "{{ m | tojson }}",
        "{{ m.content.split() | join(' ') }}",
        "{{ m.content.strip('x ') }}",
        "{{ m['con' ~ 'tent'] | replace('a', 'b') }}",
        "{{ [m.content] | join }}",
        "{{ {'a': m.content}.a }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(m.content) }}",
        "{% macro f(x) %}{{ x }}{% if x == m.role %}{% endif %}{% endmacro %}{{ f(m.content) }}",
        "{% set s = namespace(x=m.content) %}{{ s.x | upper }}",
        "{% set s = namespace(x=m.content) %}{{ s | tojson }}",
        "{% set x %}{{ m.content }}{% endset %}{{ x | upper }}",
        "{{ m.content }}{{ m.content.count('a') }}",
        "{{ m.content }}{{ messages | map(attribute='content') | list | length }}",
        "{{ m.content }}{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
        "{{ m.content }}{{ m.content }}",
        "{{ m.content * 2 }}",
        "{{ m.content }}{{ loop.previtem.content }}",
    ];
    for body in bodies {
        let template = template(&format!("{{% for m in messages %}}{body}{{% endfor %}}"));
        for content in ["xylophone", "a", "plain words"] {
            let messages = [message("user", content)];
            if let Ok((_, located)) = template.join(&messages, true) {
                assert!(located.is_none(), "{body}");
            }
        }
    }
}
