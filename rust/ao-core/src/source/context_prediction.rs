//! Context prediction: texts and chats that are asked about their own tokens.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use super::{About, Asked, RowPlace, strip};
use crate::error::Result;
use crate::example::{Context, Message};
use crate::lens::LensSettings;
use crate::rows::RowUnit;

/// What a source of documents says of them.
#[derive(Debug)]
pub(crate) struct Documents {
    /// The key of the text, or of the list of messages of a chat.
    pub(crate) text: String,
    /// Examples of each document.
    pub(crate) draws_per_text: u32,
    pub(crate) lens: LensSettings,
}

impl Documents {
    pub(super) fn asked(&self, place: &RowPlace<'_>, row: &[u8]) -> Result<Asked> {
        let mut reader = serde_json::Deserializer::from_slice(row);
        let found = KeyOf(&self.text)
            .deserialize(&mut reader)
            .and_then(|found| reader.end().map(|()| found))
            .map_err(|error| place.not_read(&error, None))?;
        let context = match found {
            // A table has its columns in every row: what is not there is a null.
            None if place.table.unit != RowUnit::Row => {
                let keys = format!(
                    "neither {:?} nor \"messages\" is there; name the key of the text or chat as \"text\"",
                    self.text
                );
                return Err(place.error("bad_field", keys));
            }
            None | Some(None) => Context::Text(String::new()),
            Some(Some(Document::Text(text))) => Context::Text(strip(&text).to_owned()),
            Some(Some(Document::Chat(turns))) => Context::Messages(turns.into_iter().map(Turn::message).collect()),
        };
        Ok(Asked { context, read: None, label: None, about: About::Tokens })
    }
}

/// One turn of a chat as data sets have it, whatever else they say of it.
#[derive(Deserialize)]
struct Turn {
    role: String,
    content: Option<String>,
}

impl Turn {
    fn message(self) -> Message {
        Message { role: self.role, content: self.content.unwrap_or_default() }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text or a list of messages with the texts \"role\" and \"content\"")]
enum Document {
    Text(String),
    Chat(Vec<Turn>),
}

/// The document under this key or under `messages`, if there is one of them, and if it is no null; other fields are passed
/// over without being kept.
struct KeyOf<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for KeyOf<'_> {
    type Value = Option<Option<Document>>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for KeyOf<'_> {
    type Value = Option<Option<Document>>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut text, mut messages) = (None, None);
        while let Some(key) = map.next_key::<std::borrow::Cow<str>>()? {
            if key == "messages" {
                messages = Some(map.next_value::<Option<Document>>()?);
            } else if key == self.0 {
                text = Some(map.next_value::<Option<Document>>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(if matches!(messages, Some(Some(_))) { messages } else { text.or(messages) })
    }
}
