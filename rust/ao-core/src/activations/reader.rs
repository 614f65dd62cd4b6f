//! Gathering rows at random: places sorted, neighbours read together, each window from where it is.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;

use super::disk::{Aligned, PAGE, open_past_cache, read_at};
use super::{HEADER_BYTES, RowType};
use crate::error::{Error, Result};

/// Rows that lie this close are read in one go, with what is between them.
const GAP_BYTES: u64 = 16 << 10;
/// Longest window.
const WINDOW_BYTES: u64 = 1 << 20;
/// Reads that are under way at once past the page cache.
const THREADS: usize = 8;

/// Where rows are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// What the page cache has from there, the rest directly.
    Auto,
    /// Through the page cache.
    Warm,
    /// Through the page cache, all windows announced first.
    Hinted,
    /// Past the page cache, several at once.
    Direct,
}

impl Mode {
    /// The mode called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "auto" => Self::Auto,
            "warm" => Self::Warm,
            "hinted" => Self::Hinted,
            "direct" => Self::Direct,
            other => {
                return Err(Error::input(format!("mode {other:?}: expected auto, warm, hinted or direct")));
            }
        })
    }
}

/// Where a row is: number of the file, and of the row in it.
pub type Place = (u32, u32);

/// Open files of rows of one layer.
pub struct RowReader {
    files: Vec<RowFile>,
    row_bytes: u64,
    pool: OnceLock<rayon::ThreadPool>,
}

struct RowFile {
    path: PathBuf,
    rows: u64,
    cached: File,
    direct: Option<File>,
}

/// Rows that are read in one go, each with where it goes, if anywhere.
struct Window<S> {
    file: u32,
    first: u64,
    end: u64,
    rows: Vec<(u64, S)>,
}

type Slot<'a> = &'a mut [u8];

impl RowReader {
    /// Open files of rows.
    ///
    /// # Errors
    /// If one is missing or no whole number of rows.
    pub fn open(paths: &[PathBuf], row: RowType) -> Result<Self> {
        let row_bytes = row.bytes() as u64;
        let files = paths.iter().map(|path| RowFile::open(path, row_bytes)).collect::<Result<_>>()?;
        Ok(Self { files, row_bytes, pool: OnceLock::new() })
    }

    /// Read the rows at `places` into `out`, in their order.
    ///
    /// # Errors
    /// If `out` has another size, a place is in no file, or a file cannot be read.
    pub fn gather(&self, places: &[Place], out: &mut [u8], mode: Mode) -> Result<()> {
        let expected = places.len() * self.row_bytes as usize;
        if out.len() != expected {
            return Err(Error::input(format!(
                "{} rows of {} bytes need a buffer of {expected}, got {}",
                places.len(),
                self.row_bytes,
                out.len()
            )));
        }
        let slots = out.chunks_exact_mut(self.row_bytes as usize);
        let mut windows = self.windows(places.iter().copied().zip(slots).collect())?;
        match mode {
            Mode::Warm => windows.iter_mut().try_for_each(|window| self.read_cached(window)),
            Mode::Hinted => {
                for window in &windows {
                    self.announce(window);
                }
                windows.iter_mut().try_for_each(|window| self.read_cached(window))
            }
            Mode::Direct => self.read_direct(&mut windows),
            Mode::Auto => {
                let mut cold = Vec::new();
                for mut window in windows {
                    if !self.read_resident(&mut window)? {
                        cold.push(window);
                    }
                }
                self.read_direct(&mut cold)
            }
        }
    }

    /// Tell the system that the rows at `places` are wanted soon, and return at once.
    ///
    /// # Errors
    /// If a place is in no file.
    pub fn prefetch(&self, places: &[Place]) -> Result<()> {
        let nowhere = places.iter().map(|&place| (place, ())).collect();
        for window in self.windows(nowhere)? {
            self.announce(&window);
        }
        Ok(())
    }

    fn windows<S>(&self, mut wanted: Vec<(Place, S)>) -> Result<Vec<Window<S>>> {
        if !wanted.is_sorted_by_key(|(place, _)| *place) {
            wanted.sort_by_key(|(place, _)| *place);
        }
        let mut windows: Vec<Window<S>> = Vec::new();
        for ((file, row), slot) in wanted {
            let row = u64::from(row);
            let rows = self.files.get(file as usize).map(|file| file.rows);
            if rows.is_none_or(|rows| row >= rows) {
                return Err(Error::input(format!(
                    "row {row} of file {file}: there are {} files, this one with {} rows",
                    self.files.len(),
                    rows.unwrap_or_default()
                )));
            }
            match windows.last_mut() {
                Some(window)
                    if window.file == file
                        && row.saturating_sub(window.end) * self.row_bytes <= GAP_BYTES
                        && (row + 1 - window.first) * self.row_bytes <= WINDOW_BYTES =>
                {
                    window.end = window.end.max(row + 1);
                    window.rows.push((row, slot));
                }
                _ => windows.push(Window { file, first: row, end: row + 1, rows: vec![(row, slot)] }),
            }
        }
        Ok(windows)
    }

    fn file<S>(&self, window: &Window<S>) -> &RowFile {
        &self.files[window.file as usize]
    }

    fn offset(&self, row: u64) -> u64 {
        HEADER_BYTES as u64 + row * self.row_bytes
    }

    fn length<S>(&self, window: &Window<S>) -> usize {
        ((window.end - window.first) * self.row_bytes) as usize
    }

    /// Put a window's rows where they go, out of what was read from `first` on.
    fn deal(&self, window: &mut Window<Slot<'_>>, bytes: &[u8]) {
        for (row, slot) in &mut window.rows {
            let at = ((*row - window.first) * self.row_bytes) as usize;
            slot.copy_from_slice(&bytes[at..at + slot.len()]);
        }
    }

    fn read_cached(&self, window: &mut Window<Slot<'_>>) -> Result<()> {
        let file = self.file(window);
        if let [(row, slot)] = window.rows.as_mut_slice() {
            return read_exact(&file.cached, &file.path, slot, self.offset(*row));
        }
        let mut bytes = vec![0; self.length(window)];
        read_exact(&file.cached, &file.path, &mut bytes, self.offset(window.first))?;
        self.deal(window, &bytes);
        Ok(())
    }

    /// Read a window if the page cache has it whole.
    fn read_resident(&self, window: &mut Window<Slot<'_>>) -> Result<bool> {
        let file = self.file(window);
        let mut bytes = vec![0; self.length(window)];
        if !read_without_waiting(&file.cached, &mut bytes, self.offset(window.first))
            .map_err(|error| Error::io(&file.path, "reading", error))?
        {
            return Ok(false);
        }
        self.deal(window, &bytes);
        Ok(true)
    }

    fn read_direct(&self, windows: &mut [Window<Slot<'_>>]) -> Result<()> {
        let one = |scratch: &mut Aligned, window: &mut Window<Slot<'_>>| {
            let file = self.file(window);
            let Some(direct) = &file.direct else { return self.read_cached(window) };
            let (start, length) = (self.offset(window.first), self.length(window));
            let from = start / PAGE as u64 * PAGE as u64;
            let skipped = (start - from) as usize;
            let wanted = (skipped + length).next_multiple_of(PAGE);
            if scratch.len() < wanted {
                *scratch = Aligned::new(wanted);
            }
            let mut read = 0;
            while read < skipped + length {
                // A read that ends within a page has met the end of the file.
                let more = if read.is_multiple_of(PAGE) {
                    read_at(direct, &mut scratch[read..wanted], from + read as u64)
                } else {
                    Ok(0)
                };
                match more {
                    Ok(0) => return Err(cut(&file.path, start + length as u64)),
                    Ok(more) => read += more,
                    // Some file systems take the flag and refuse the read.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => return self.read_cached(window),
                    Err(error) => return Err(Error::io(&file.path, "reading", error)),
                }
            }
            self.deal(window, &scratch[skipped..skipped + length]);
            Ok(())
        };
        if windows.len() <= 1 {
            return windows.iter_mut().try_for_each(|window| one(&mut Aligned::new(0), window));
        }
        let pool = self.pool.get_or_init(|| {
            rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().expect("the system gives eight threads")
        });
        pool.install(|| windows.par_iter_mut().try_for_each_init(|| Aligned::new(0), one))
    }

    #[cfg(target_os = "linux")]
    fn announce<S>(&self, window: &Window<S>) {
        use rustix::fs::{Advice, fadvise};

        let length = std::num::NonZeroU64::new(self.length(window) as u64);
        // A hint; without it the rows are read all the same.
        let _ = fadvise(&self.file(window).cached, self.offset(window.first), length, Advice::WillNeed);
    }

    #[cfg(not(target_os = "linux"))]
    fn announce<S>(&self, _window: &Window<S>) {}
}

impl RowFile {
    fn open(path: &Path, row_bytes: u64) -> Result<Self> {
        let failed = |action| move |error| Error::io(path, action, error);
        let cached = File::open(path).map_err(failed("opening"))?;
        let size = cached.metadata().map_err(failed("reading"))?.len();
        let rows = size.checked_sub(HEADER_BYTES as u64).filter(|bytes| bytes.is_multiple_of(row_bytes));
        let rows = rows.ok_or_else(|| {
            Error::shard(
                path,
                format!("{size} bytes are no whole number of rows of {row_bytes}; collect the unit again"),
            )
        })?;
        // Windows are what is wanted; what lies behind them is not.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(&cached, 0, None, rustix::fs::Advice::Random);
        Ok(Self {
            path: path.to_path_buf(),
            rows: rows / row_bytes,
            cached,
            direct: open_past_cache(path).map_err(failed("opening"))?,
        })
    }
}

fn cut(path: &Path, end: u64) -> Error {
    Error::shard(path, format!("damaged: it ends before byte {end}; remove its index and collect the unit again"))
}

fn read_exact(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<()> {
    let mut read = 0;
    while read < bytes.len() {
        match read_at(file, &mut bytes[read..], offset + read as u64) {
            Ok(0) => return Err(cut(path, offset + bytes.len() as u64)),
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(path, "reading", error)),
        }
    }
    Ok(())
}

/// Fill `bytes` from the page cache, or say that it lacks some of them.
#[cfg(target_os = "linux")]
fn read_without_waiting(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    let wanted = bytes.len();
    match preadv2(file, &mut [io::IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => Ok(read == wanted),
        // Not there, or a file system that cannot tell.
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn read_without_waiting(_file: &File, _bytes: &mut [u8], _offset: u64) -> io::Result<bool> {
    Ok(false)
}
