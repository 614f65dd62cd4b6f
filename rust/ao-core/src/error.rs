//! The one error type of the crate.
//!
//! A message says what is wrong, which input it concerns, what was expected, what was found and what to do.
//! Errors raised deep inside are given their source and example on the way out by [`Error::in_example`].

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// What every fallible function of the crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by what the reader of the message has to look at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that was asked for does not exist.
    #[error("{}: no such file", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused a read or a write.
    #[error("{}: {action} failed: {source}{}", path.display(), remedy(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done to it.
        action: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The tokenizer cannot be built or cannot do what is asked.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template cannot be compiled or rendered, or does not have the shape that is needed.
    #[error("chat template: {0}")]
    Template(String),
    /// An argument or a field has a value that cannot be used.
    #[error("{0}")]
    Input(String),
    /// A field of an example has a value that cannot be used, and that is common enough to be counted by itself.
    #[error("{what}")]
    Value {
        /// In one word, for counts.
        reason: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The settings of a writer or of a source cannot be used.
    #[error("settings: {0}")]
    Settings(String),
    /// One row of a source cannot be read.
    #[error("source {origin:?}, {place}: {what}")]
    Row {
        /// The source's name.
        origin: String,
        /// The file and the row, as people count.
        place: String,
        /// In one word, for counts.
        reason: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// Two examples have one id, by which everything is drawn.
    #[error("the id was used before; ids must be unique in a data set, so rename one of the two")]
    RepeatedId,
    /// One example cannot be packed.
    #[error("source {origin:?}, {place}, example {id:?}: {error}")]
    Example {
        /// The source's name.
        origin: String,
        /// The file and the row, as people count.
        place: String,
        /// The example's id.
        id: String,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// A shard does not hold what it should.
    #[error("{}: {what}; {remedy}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A plan cannot be made from these arguments.
    #[error("plan: {0}")]
    Plan(String),
}

/// What helps where the operating system refuses.
fn remedy(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free some space and go on with --resume, what is finished is kept"
        }
        std::io::ErrorKind::FileTooLarge => {
            "; no file may grow that large here, so raise the limit (`ulimit -f` says it) and go on with --resume"
        }
        std::io::ErrorKind::PermissionDenied => "; change its permissions, or name another",
        _ => "",
    }
}

impl Error {
    pub(crate) fn input(what: impl Display) -> Self {
        Self::Input(what.to_string())
    }

    pub(crate) fn settings(what: impl Display) -> Self {
        Self::Settings(what.to_string())
    }

    /// The same error as one of a source's settings.
    pub(crate) fn in_settings_of(self, source: &str) -> Self {
        match self {
            Self::Settings(what) => Self::settings(format!("source {source:?}: {what}")),
            other => Self::settings(format!("source {source:?}: {other}")),
        }
    }

    pub(crate) fn template(what: impl Display) -> Self {
        Self::Template(what.to_string())
    }

    pub(crate) fn tokenizer(what: impl Display) -> Self {
        Self::Tokenizer(what.to_string())
    }

    pub(crate) fn value(reason: &'static str, what: impl Display) -> Self {
        Self::Value { reason, what: what.to_string() }
    }

    /// Something wrong with a shard of a finished data set.
    pub(crate) fn shard(path: &Path, what: impl Display) -> Self {
        Self::Shard { path: path.to_owned(), what: what.to_string(), remedy: "build the packed data set again" }
    }

    /// Something wrong with a file of an activation cache.
    pub(crate) fn cached(path: &Path, what: impl Display) -> Self {
        Self::shard(path, what).with_remedy("remove its unit's index and run ao collect again")
    }

    /// The same error with another remedy, where it is one of a shard.
    pub(crate) fn with_remedy(self, remedy: &'static str) -> Self {
        match self {
            Self::Shard { path, what, .. } => Self::Shard { path, what, remedy },
            other => other,
        }
    }

    /// An operating system error at `path`; a missing file is told apart, so that Python can raise its own error.
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        let path = path.to_owned();
        if source.kind() == std::io::ErrorKind::NotFound {
            Self::Missing { path }
        } else {
            Self::Io { path, action, source }
        }
    }

    /// The error in one word, for counts of what was passed over.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Row { reason, .. } | Self::Value { reason, .. } => reason,
            Self::Example { error, .. } => error.reason(),
            Self::RepeatedId => "duplicate_id",
            Self::Tokenizer(_) => "tokenizer",
            Self::Template(_) => "template",
            _ => "bad_value",
        }
    }

    /// Whether the settings are wrong, and not the example at which it showed.
    pub(crate) fn is_of_settings(&self) -> bool {
        match self {
            Self::Settings(_) => true,
            Self::Example { error, .. } => error.is_of_settings(),
            _ => false,
        }
    }

    /// The same error once more, for each example that it concerns.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Row { origin, place, reason, what } => {
                Self::Row { origin: origin.clone(), place: place.clone(), reason, what: what.clone() }
            }
            Self::Example { origin, place, id, error } => error.again().in_example(origin, place, id),
            Self::Value { reason, what } => Self::value(reason, what),
            Self::Settings(what) => Self::Settings(what.clone()),
            Self::Template(what) => Self::Template(what.clone()),
            Self::Tokenizer(what) => Self::Tokenizer(what.clone()),
            Self::RepeatedId => Self::RepeatedId,
            Self::Input(what) => Self::Input(what.clone()),
            other => Self::input(other),
        }
    }

    /// The same error, naming the example that it concerns.
    #[must_use]
    pub fn in_example(self, origin: &str, place: &str, id: &str) -> Self {
        let [origin, place, id] = [origin, place, id].map(str::to_owned);
        Self::Example { origin, place, id, error: Box::new(self) }
    }
}
