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
    #[error("source {origin:?}, example {id:?}: {error}")]
    Example {
        /// The source's name.
        origin: String,
        /// The example's id.
        id: String,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// A shard does not hold what it should.
    #[error("{}: {what}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
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

    pub(crate) fn template(what: impl Display) -> Self {
        Self::Template(what.to_string())
    }

    pub(crate) fn tokenizer(what: impl Display) -> Self {
        Self::Tokenizer(what.to_string())
    }

    pub(crate) fn shard(path: &Path, what: impl Display) -> Self {
        Self::Shard { path: path.to_owned(), what: what.to_string() }
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
            Self::Row { reason, .. } => reason,
            Self::Example { error, .. } => error.reason(),
            Self::RepeatedId => "duplicate_id",
            Self::Tokenizer(_) => "tokenizer",
            Self::Template(_) => "template",
            _ => "bad_value",
        }
    }

    /// The same error once more, for each example that it concerns.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Row { origin, place, reason, what } => {
                Self::Row { origin: origin.clone(), place: place.clone(), reason, what: what.clone() }
            }
            Self::Example { origin, id, error } => {
                Self::Example { origin: origin.clone(), id: id.clone(), error: Box::new(error.again()) }
            }
            Self::Template(what) => Self::Template(what.clone()),
            Self::Tokenizer(what) => Self::Tokenizer(what.clone()),
            Self::RepeatedId => Self::RepeatedId,
            Self::Input(what) => Self::Input(what.clone()),
            other => Self::input(other),
        }
    }

    /// The same error, naming the example that it concerns.
    #[must_use]
    pub fn in_example(self, origin: &str, id: &str) -> Self {
        Self::Example { origin: origin.to_owned(), id: id.to_owned(), error: Box::new(self) }
    }
}
