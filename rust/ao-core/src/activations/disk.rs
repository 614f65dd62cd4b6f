//! Files past the page cache: direct I/O where system and file system take it, plain files elsewhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::Path;

/// What direct I/O wants offsets, lengths and addresses to be multiples of.
pub(crate) const PAGE: usize = 4096;

/// Zeroed bytes that begin at a multiple of [`PAGE`].
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(crate) fn new(length: usize) -> Self {
        let bytes = vec![0; length + PAGE];
        // Moving the vector leaves its heap where it is.
        let start = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, start, length }
    }

    /// The first `length` bytes, in a new place where there are fewer.
    pub(crate) fn at_least(&mut self, length: usize) -> &mut [u8] {
        if self.length < length {
            *self = Self::new(length);
        }
        &mut self[..length]
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// A new file for writing whose first page is zero; past the page cache where that can be. Nothing is left where it fails.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let plain = options.clone().create_new(true).open(path)?;
    let begun = (|| {
        if let Some(file) = direct(&mut options, path)? {
            match write_at(&file, &Aligned::new(PAGE), 0) {
                // Some file systems take the flag and refuse the write.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                written => return written.map(|()| file),
            }
        }
        write_at(&plain, &[0; PAGE], 0)?;
        Ok(plain)
    })();
    if begun.is_err() {
        let _ = std::fs::remove_file(path);
    }
    begun
}

/// A file for reading past the page cache, if that can be.
pub(crate) fn open_past_cache(path: &Path) -> io::Result<Option<File>> {
    direct(OpenOptions::new().read(true), path)
}

#[cfg(target_os = "linux")]
fn direct(options: &mut OpenOptions, path: &Path) -> io::Result<Option<File>> {
    use std::os::unix::fs::OpenOptionsExt;

    match options.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed()).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(not(target_os = "linux"))]
fn direct(_options: &mut OpenOptions, _path: &Path) -> io::Result<Option<File>> {
    Ok(None)
}

#[cfg(unix)]
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}
