//! Canonical JSON, fingerprints and the only way in which a file is written.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};

/// `value` with sorted keys and no spaces, so that equal values are equal bytes.
#[must_use]
pub fn canonical_json(value: &Value) -> String {
    let mut out = String::new();
    write_canonical(value, &mut out);
    out
}

/// The same of an object's fields.
pub(crate) fn canonical_object(fields: &Map<String, Value>) -> String {
    let mut out = String::new();
    write_object(fields, &mut out);
    out
}

fn write_object(fields: &Map<String, Value>, out: &mut String) {
    let mut entries: Vec<_> = fields.iter().collect();
    entries.sort_by_key(|(key, _)| key.as_str());
    out.push('{');
    for (at, (key, entry)) in entries.into_iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        out.push_str(&Value::from(key.as_str()).to_string());
        out.push(':');
        write_canonical(entry, out);
    }
    out.push('}');
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(fields) => write_object(fields, out),
        Value::Array(items) => {
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// The sha256 of `bytes` in lower-case hexadecimal.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a string accepts every write");
        out
    })
}

/// The xxh3-128 of a file in lower-case hexadecimal: a digest that costs less than the reading.
///
/// # Errors
/// If the file is missing or cannot be read.
pub fn xxh3_hex(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|error| Error::io(path, "opening", error))?;
    let mut hasher = Xxh3::new();
    each_block(&mut file, path, |block| hasher.update(block))?;
    Ok(xxh3_text(&hasher))
}

/// What an xxh3-128 is written as.
pub(crate) fn xxh3_text(hasher: &Xxh3) -> String {
    format!("{:032x}", hasher.digest128())
}

/// Show `use_block` the rest of `file`, which lies at `path`, piece by piece.
pub(crate) fn each_block(file: &mut File, path: &Path, mut use_block: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|error| Error::io(path, "reading", error))? {
            0 => return Ok(()),
            read => use_block(&buffer[..read]),
        }
    }
}

/// Write `data` to `path` so that a reader sees the old file or the whole new one, also after a power cut.
///
/// The data go to a sibling, are flushed to the disk, and the sibling takes the name; then the folder is flushed.
///
/// # Errors
/// If the operating system refuses; no temporary file is left behind.
pub fn write_atomic(path: &Path, data: &[u8]) -> Result<()> {
    let sibling = Sibling::create(path)?;
    sibling.write(data)?;
    sibling.rename_to(path)
}

/// The name that a temporary file of [`write_atomic`] was to take, where `name` is one's that a killed process left.
pub(crate) fn torn(name: &str) -> Option<&str> {
    let inner = name.strip_prefix('.')?.strip_suffix(".partial")?;
    let mut parts = inner.rsplitn(3, '.');
    let is_number = |part: Option<&str>| part.is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    (is_number(parts.next()) && is_number(parts.next())).then(|| parts.next())?
}

/// A temporary file beside its final place, removed when dropped before the rename.
struct Sibling {
    path: PathBuf,
    file: Option<File>,
}

impl Sibling {
    fn create(beside: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name =
            beside.file_name().ok_or_else(|| Error::input(format!("{}: not the name of a file", beside.display())))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            beside.with_file_name(format!(".{}.{}.{number}.partial", name.to_string_lossy(), std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| Error::io(&path, "creating", error))?;
        Ok(Self { path, file: Some(file) })
    }

    fn write(&self, data: &[u8]) -> Result<()> {
        let mut file = self.file.as_ref().expect("the file is open until the rename");
        file.write_all(data).map_err(|error| Error::io(&self.path, "writing", error))?;
        file.sync_all().map_err(|error| Error::io(&self.path, "flushing", error))
    }

    fn rename_to(mut self, path: &Path) -> Result<()> {
        std::fs::rename(&self.path, path).map_err(|error| Error::io(path, "renaming into place", error))?;
        self.file = None;
        sync_folder(path)
    }
}

impl Drop for Sibling {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing better can be done about a failure here than to leave the file; its name says what it is.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Make a rename in the folder of `path` last.
#[cfg(unix)]
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(folder, "flushing", error))
}

#[cfg(not(unix))]
pub(crate) fn sync_folder(_path: &Path) -> Result<()> {
    Ok(())
}
