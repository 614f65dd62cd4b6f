//! Gathering rows at random: places sorted, neighbours read together, each window from where it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use serde_json::Value;

use super::disk::{Aligned, PAGE, open_past_cache, read_at};
use super::index::Unit;
use super::{HEADER_BYTES, RowType, TENSOR, header};
use crate::error::{Error, Result};
use crate::manifest::canonical_json;

/// Rows that lie this close are read in one go, with what is between them.
const GAP_BYTES: u64 = 16 << 10;
/// Longest window.
const WINDOW_BYTES: u64 = 1 << 20;
/// Reads that are under way at once past the page cache.
const THREADS: usize = 8;
/// So much and more is copied from the page cache by several threads: one core does not use all of the memory's speed.
const SHARED_BYTES: usize = 4 << 20;
/// Windows that are looked at to see where the rows are.
const SAMPLE: usize = 8;
/// Files of a layer that stay open: a process may often have no more than 1,024 in all.
const KEPT_OPEN: usize = 64;

/// What a person can do about a file that does not fit its index.
const SEE: &str = "ao inspect --verify names what is damaged";

/// Where rows are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As some of the rows are in the page cache, all or none: hinted, warm or direct.
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

/// Files of rows of one layer.
pub struct RowReader {
    files: Vec<RowFile>,
    /// Rows up to and with each file.
    ends: Vec<u64>,
    row_bytes: u64,
    /// File n stays open at place n modulo their number, until another one wants the place.
    kept: Vec<Mutex<Option<Arc<OpenFile>>>>,
}

struct RowFile {
    path: PathBuf,
    rows: u64,
    /// What the rows are.
    contract: Value,
}

struct OpenFile {
    number: u32,
    cached: File,
    /// For reading past the page cache, if that can be; opened when it is first wanted.
    direct: OnceLock<Option<File>>,
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
    /// Look at files of rows.
    ///
    /// # Errors
    /// If one is missing, cut, or not the file that its name says.
    pub fn open(paths: &[PathBuf], row: RowType) -> Result<Self> {
        let files = paths.iter().map(|path| RowFile::open(path, row)).collect::<Result<Vec<_>>>()?;
        let mut ends: Vec<u64> = files.iter().map(|file| file.rows).collect();
        for at in 1..ends.len() {
            ends[at] += ends[at - 1];
        }
        let kept = files.iter().take(KEPT_OPEN).map(|_| Mutex::new(None)).collect();
        Ok(Self { files, ends, row_bytes: row.bytes() as u64, kept })
    }

    /// Refuse files that hold other rows than their indexes say: another number, or of another contract.
    ///
    /// # Errors
    /// If one does, or there are more or fewer `rows` than files.
    pub fn require(&self, rows: &[u64], contract: &Value) -> Result<()> {
        if rows.len() != self.files.len() {
            return Err(Error::input(format!(
                "rows: expected a number for each of {} files, got {}",
                self.files.len(),
                rows.len()
            )));
        }
        for (file, &expected) in self.files.iter().zip(rows) {
            if file.rows != expected {
                let what = format!("it holds {} rows, its index lists {expected}; {SEE}", file.rows);
                return Err(Error::cached(&file.path, what));
            }
            if file.contract != *contract {
                let [own, other] = [&file.contract, contract].map(canonical_json);
                return Err(Error::cached(
                    &file.path,
                    format!("its rows are of {own}, by its index of {other}; {SEE}"),
                ));
            }
        }
        Ok(())
    }

    /// Rows in all files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.last().map_or(0, |&end| end as usize)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
        let mode = if mode == Mode::Auto { self.mode_of(&windows)? } else { mode };
        match mode {
            Mode::Warm => self.read_warm(&mut windows, expected),
            Mode::Hinted => {
                windows.iter().try_for_each(|window| self.announce(window))?;
                self.read_warm(&mut windows, expected)
            }
            Mode::Direct => on_threads(&mut windows, THREADS, |scratch, window| self.read_direct(window, scratch)),
            Mode::Auto => unreachable!("it stands for one of the others"),
        }
    }

    /// What `Auto` stands for, by the first byte of a few windows.
    fn mode_of<S>(&self, windows: &[Window<S>]) -> Result<Mode> {
        let (mut all, mut any) = (true, false);
        for window in windows.iter().step_by(windows.len().div_ceil(SAMPLE).max(1)) {
            let there = is_resident(&self.opened(window.file)?.cached, self.offset(window.first));
            (all, any) = (all && there, any || there);
        }
        Ok(match (all, any) {
            (true, _) => Mode::Warm,
            (_, true) => Mode::Hinted,
            _ => Mode::Direct,
        })
    }

    /// The file and the row there of each row, counted over all files.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn places(&self, rows: &[i64]) -> Result<Vec<Place>> {
        let place = |row: i64| {
            let row = u64::try_from(row).ok().filter(|row| self.ends.last().is_some_and(|end| row < end));
            let file = row.map(|row| (self.ends.partition_point(|&end| end <= row), row));
            file.map(|(file, row)| (file as u32, (row + self.files[file].rows - self.ends[file]) as u32))
        };
        rows.iter().map(|&row| place(row).ok_or_else(|| self.no_row(row))).collect()
    }

    fn no_row(&self, row: i64) -> Error {
        Error::input(format!("row {row}: there are {} rows", self.ends.last().unwrap_or(&0)))
    }

    /// Tell the system that the rows at `places` are wanted soon, and return at once.
    ///
    /// # Errors
    /// If a place is in no file.
    pub fn prefetch(&self, places: &[Place]) -> Result<()> {
        let nowhere = places.iter().map(|&place| (place, ())).collect();
        self.windows(nowhere)?.iter().try_for_each(|window| self.announce(window))
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

    fn path<S>(&self, window: &Window<S>) -> &Path {
        &self.files[window.file as usize].path
    }

    fn opened(&self, number: u32) -> Result<Arc<OpenFile>> {
        let place = &self.kept[number as usize % self.kept.len()];
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Some(file) if file.number == number => Ok(Arc::clone(file)),
            _ => {
                let file = Arc::new(OpenFile::open(number, &self.files[number as usize].path)?);
                *place = Some(Arc::clone(&file));
                Ok(file)
            }
        }
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

    fn read_warm(&self, windows: &mut [Window<Slot<'_>>], bytes: usize) -> Result<()> {
        let cores = if bytes < SHARED_BYTES { 1 } else { thread::available_parallelism().map_or(1, usize::from) };
        on_threads(windows, cores.min(THREADS), |scratch, window| self.read_cached(window, scratch))
    }

    fn read_cached(&self, window: &mut Window<Slot<'_>>, scratch: &mut Aligned) -> Result<()> {
        let (file, path) = (self.opened(window.file)?, self.path(window));
        let failed = |error| Error::io(path, "reading", error);
        if window.rows.iter().map(|(row, _)| *row).eq(window.first..window.end)
            && read_into_slots(&file.cached, &mut window.rows, self.offset(window.first)).map_err(failed)?
        {
            return Ok(());
        }
        let bytes = scratch.at_least(self.length(window));
        read_exact(&file.cached, path, bytes, self.offset(window.first))?;
        self.deal(window, bytes);
        Ok(())
    }

    fn read_direct(&self, window: &mut Window<Slot<'_>>, scratch: &mut Aligned) -> Result<()> {
        let (file, path) = (self.opened(window.file)?, self.path(window));
        let failed = |error| Error::io(path, "reading", error);
        let Some(direct) = file.direct(path).map_err(failed)? else {
            return self.read_cached(window, scratch);
        };
        let (start, length) = (self.offset(window.first), self.length(window));
        let from = start / PAGE as u64 * PAGE as u64;
        let skipped = (start - from) as usize;
        let bytes = scratch.at_least((skipped + length).next_multiple_of(PAGE));
        let mut read = 0;
        while read < skipped + length {
            // A read that ends within a page has met the end of the file.
            let more =
                if read.is_multiple_of(PAGE) { read_at(direct, &mut bytes[read..], from + read as u64) } else { Ok(0) };
            match more {
                Ok(0) => return Err(cut(path, start + length as u64)),
                Ok(more) => read += more,
                // Some file systems take the flag and refuse the read.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    return self.read_cached(window, scratch);
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.deal(window, &bytes[skipped..skipped + length]);
        Ok(())
    }

    /// Tell the system that a window is wanted soon.
    fn announce<S>(&self, window: &Window<S>) -> Result<()> {
        will_need(&self.opened(window.file)?.cached, self.offset(window.first), self.length(window) as u64);
        Ok(())
    }
}

/// Do something with each window, several at once, each thread with a buffer of its own.
///
/// The threads are made anew: those of a pool would be missing in a process that was forked, which would wait for ever.
fn on_threads<W: Send>(
    windows: &mut [W],
    threads: usize,
    work: impl Fn(&mut Aligned, &mut W) -> Result<()> + Sync,
) -> Result<()> {
    if threads <= 1 || windows.len() <= 1 {
        let scratch = &mut Aligned::new(0);
        return windows.iter_mut().try_for_each(|window| work(scratch, window));
    }
    let threads = threads.min(windows.len());
    let left = Mutex::new(windows.iter_mut());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let one = || {
        let scratch = &mut Aligned::new(0);
        std::iter::from_fn(next).try_for_each(|window| work(scratch, window))
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
        let own = one();
        others.into_iter().map(|other| other.join().expect("a thread that reads does not panic")).fold(own, Result::and)
    })
}

impl RowFile {
    fn open(path: &Path, row: RowType) -> Result<Self> {
        let failed = |action| move |error| Error::io(path, action, error);
        let mut cached = File::open(path).map_err(failed("opening"))?;
        let size = cached.metadata().map_err(failed("reading"))?.len();
        let mut bytes = vec![0; HEADER_BYTES.min(size as usize)];
        cached.read_exact(&mut bytes).map_err(failed("reading"))?;
        let (header, about, _) = header::decode(path, &bytes)?;
        let rows = header.info(TENSOR).filter(|info| info.dtype == row.dtype).and_then(|info| match info.shape[..] {
            [rows, width] if width == row.width => Some(rows as u64),
            _ => None,
        });
        let own = Unit::rows_name_of(&about);
        let is_own = own.as_deref().is_some_and(|own| path.file_name().is_some_and(|name| name == own));
        match rows.filter(|rows| is_own && size == HEADER_BYTES as u64 + rows * row.bytes() as u64) {
            Some(rows) => Ok(Self { path: path.to_path_buf(), rows, contract: about["contract"].clone() }),
            None => Err(Error::cached(
                path,
                format!(
                    "damaged or another's: {size} bytes, and by its header {} with {} rows of {} {} values",
                    own.unwrap_or_else(|| "no file of a cache".to_owned()),
                    rows.map_or_else(|| "no".to_owned(), |rows| rows.to_string()),
                    row.width,
                    row.name(),
                ),
            )),
        }
    }
}

impl OpenFile {
    fn open(number: u32, path: &Path) -> Result<Self> {
        let cached = File::open(path).map_err(|error| Error::io(path, "opening", error))?;
        only_windows(&cached);
        Ok(Self { number, cached, direct: OnceLock::new() })
    }

    fn direct(&self, path: &Path) -> io::Result<Option<&File>> {
        if self.direct.get().is_none() {
            let opened = open_past_cache(path)?;
            return Ok(self.direct.get_or_init(|| opened).as_ref());
        }
        Ok(self.direct.get().and_then(Option::as_ref))
    }
}

fn cut(path: &Path, end: u64) -> Error {
    Error::cached(path, format!("damaged: it ends before byte {end}"))
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

/// Read rows that lie side by side, each to its own place; says whether all of them came.
#[cfg(target_os = "linux")]
fn read_into_slots(file: &File, rows: &mut [(u64, Slot<'_>)], offset: u64) -> io::Result<bool> {
    let wanted: usize = rows.iter().map(|(_, slot)| slot.len()).sum();
    let mut slots: Vec<_> = rows.iter_mut().map(|(_, slot)| io::IoSliceMut::new(slot)).collect();
    match rustix::io::preadv(file, &mut slots, offset) {
        Ok(read) => Ok(read == wanted),
        // More rows than the system takes at once, or a signal.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn read_into_slots(_file: &File, _rows: &mut [(u64, Slot<'_>)], _offset: u64) -> io::Result<bool> {
    Ok(false)
}

/// Windows are what is wanted of a file; what lies behind them is not.
#[cfg(target_os = "linux")]
fn only_windows(file: &File) {
    // A hint, as below.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
}

#[cfg(not(target_os = "linux"))]
fn only_windows(_file: &File) {}

#[cfg(target_os = "linux")]
fn will_need(file: &File, offset: u64, length: u64) {
    // Without it the rows are read all the same.
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(length), rustix::fs::Advice::WillNeed);
}

#[cfg(not(target_os = "linux"))]
fn will_need(_file: &File, _offset: u64, _length: u64) {}

/// Whether a byte can be read without waiting for the disk; where the file system cannot tell, it is taken to be so.
#[cfg(target_os = "linux")]
fn is_resident(file: &File, offset: u64) -> bool {
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    let mut byte = [0];
    !matches!(preadv2(file, &mut [io::IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT), Err(Errno::AGAIN))
}

#[cfg(not(target_os = "linux"))]
fn is_resident(_file: &File, _offset: u64) -> bool {
    true
}
