//! Writing a unit: rows are appended by layer, hashed and copied into aligned buffers, which a thread writes to the disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use xxhash_rust::xxh3::Xxh3;

use super::disk::{Aligned, PAGE, create, write_at};
use super::index::{self, LayerRows, Unit};
use super::{BLOCK_BYTES, HEADER_BYTES, header};
use crate::error::{Error, Result};
use crate::manifest::{canonical_json, sync_folder, torn, write_atomic};

/// What the buffers of all layers may take together.
const MEMORY_BYTES: usize = 48 << 20;
/// Largest and smallest buffer.
const BUFFER_BYTES: (usize, usize) = (2 << 20, 64 << 10);
/// What is copied and hashed at once: it is still in the processor's cache when it is hashed.
const PIECE_BYTES: usize = 32 << 10;
/// Buffers beside those that layers are filling: what is being written, and what comes next.
const SPARE_BUFFERS: usize = 2;

/// Writes one unit of a cache. Dropped before [`UnitWriter::finish`] it leaves nothing behind.
pub struct UnitWriter {
    folder: PathBuf,
    unit: Unit,
    streams: BTreeMap<u16, Stream>,
    disk: Disk,
}

/// The file of one layer while it is written.
struct Stream {
    path: PathBuf,
    file: Option<Arc<File>>,
    buffer: Option<Aligned>,
    filled: usize,
    /// Where the buffer begins in the file.
    offset: u64,
    block: Xxh3,
    in_block: usize,
    held: LayerRows,
}

impl UnitWriter {
    /// Begin a unit with rows for some of `layers`. What a killed process left of the same unit is removed.
    ///
    /// # Errors
    /// If the folder cannot be made, or run or contract cannot be written down.
    pub fn new(folder: &Path, unit: Unit, layers: &[u16]) -> Result<Self> {
        require_writable(&unit)?;
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "creating the folder", error))?;
        remove_torn(folder, &unit, layers)?;
        let streams = layers
            .iter()
            .map(|&layer| {
                unit.header(layer, u64::from(u32::MAX))?;
                let name = format!(".{}.{}.0.partial", unit.rows_name(layer), std::process::id());
                Ok((layer, Stream::new(folder.join(name))))
            })
            .collect::<Result<BTreeMap<_, _>>>()?;
        let share = MEMORY_BYTES / (streams.len() + SPARE_BUFFERS);
        let buffer_bytes = share.clamp(BUFFER_BYTES.1, BUFFER_BYTES.0) / PAGE * PAGE;
        let disk = Disk::new(streams.len() + SPARE_BUFFERS, buffer_bytes);
        Ok(Self { folder: folder.to_path_buf(), unit, streams, disk })
    }

    /// Append rows to a layer: `rows` holds one after the other, `keys` and `norms` an entry for each.
    ///
    /// # Errors
    /// If the layer is not one of the unit's, the lengths do not agree, or the disk fails.
    pub fn append(&mut self, layer: u16, keys: &[u128], norms: &[f32], rows: &[u8]) -> Result<()> {
        let bytes = self.unit.row.bytes();
        if rows.len() != keys.len() * bytes || norms.len() != keys.len() {
            return Err(Error::input(format!(
                "layer {layer}: {} keys and {} norms for {} bytes of rows, which hold {bytes} each",
                keys.len(),
                norms.len(),
                rows.len()
            )));
        }
        let known: Vec<u16> = self.streams.keys().copied().collect();
        let stream = self
            .streams
            .get_mut(&layer)
            .ok_or_else(|| Error::input(format!("layer {layer} is not among the unit's, {known:?}")))?;
        if stream.held.keys.len() + keys.len() > u32::MAX as usize {
            return Err(Error::input(format!("layer {layer}: a unit holds at most {} rows", u32::MAX)));
        }
        stream.append(rows, &mut self.disk)?;
        stream.held.keys.extend_from_slice(keys);
        stream.held.norms.extend_from_slice(norms);
        Ok(())
    }

    /// Rows of each layer so far.
    #[must_use]
    pub fn rows(&self) -> BTreeMap<u16, usize> {
        self.streams.iter().map(|(&layer, stream)| (layer, stream.held.keys.len())).collect()
    }

    /// Write what is left, put the headers in, give the files their names and write the index, whose name is returned.
    ///
    /// # Errors
    /// If a key is there twice in a layer, or the disk fails; nothing is left behind then.
    pub fn finish(mut self) -> Result<String> {
        for stream in self.streams.values_mut() {
            stream.flush(&mut self.disk)?;
        }
        self.disk.wait()?;
        let held = self.streams.iter().map(|(&layer, stream)| (layer, &stream.held)).collect();
        let bytes = index::encode(&self.unit, &held)?;
        for (&layer, stream) in &self.streams {
            let Some(file) = &stream.file else { continue };
            let failed = |error| Error::io(&stream.path, "writing", error);
            let rows = stream.held.keys.len();
            let mut page = Aligned::new(HEADER_BYTES);
            page.copy_from_slice(&self.unit.header(layer, rows as u64)?);
            write_at(file, &page, 0).map_err(failed)?;
            file.set_len((HEADER_BYTES + rows * self.unit.row.bytes()) as u64).map_err(failed)?;
            file.sync_all().map_err(failed)?;
        }
        let name = self.unit.index_name();
        let index = self.folder.join(&name);
        // Where the unit was there before: an index never stands beside other rows than its own.
        match std::fs::remove_file(&index) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(&index, "removing", error)),
            _ => {}
        }
        for (&layer, stream) in self.streams.iter_mut().filter(|(_, stream)| stream.file.is_some()) {
            let path = self.folder.join(self.unit.rows_name(layer));
            std::fs::rename(&stream.path, &path).map_err(|error| Error::io(&path, "renaming into place", error))?;
            stream.path = path;
        }
        sync_folder(&index)?;
        write_atomic(&index, &bytes)?;
        self.streams.clear();
        Ok(name)
    }
}

fn require_writable(unit: &Unit) -> Result<()> {
    if Path::new(&unit.run).file_name().is_none_or(|name| name != unit.run.as_str()) {
        return Err(Error::input(format!("the run {:?} cannot be a part of a file's name", unit.run)));
    }
    // Whoever checks the unit writes its headers again, and they must be the same.
    let about = header::about(&unit.contract, &unit.run, unit.number, 0);
    if !unit.contract.is_object() || serde_json::from_str(&canonical_json(&about)).ok() != Some(about) {
        return Err(Error::input(
            "the contract is no JSON object that reads back as it was written; write long decimal fractions as text",
        ));
    }
    Ok(())
}

/// Remove what killed processes left of a unit. Whose lock is held belongs to one that lives, perhaps in another container,
/// where the number in the name says nothing. Other units are left alone: other ranks write them.
fn remove_torn(folder: &Path, unit: &Unit, layers: &[u16]) -> Result<()> {
    let failed = |error| Error::io(folder, "listing", error);
    let mut own: Vec<String> = layers.iter().map(|&layer| unit.rows_name(layer)).collect();
    own.push(unit.index_name());
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if torn(&entry.file_name().to_string_lossy()).is_none_or(|name| !own.iter().any(|own| own == name)) {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        if !matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            std::fs::remove_file(entry.path()).map_err(|error| Error::io(&entry.path(), "removing", error))?;
        }
    }
    Ok(())
}

impl Drop for UnitWriter {
    fn drop(&mut self) {
        let _ = self.disk.wait();
        for stream in self.streams.values() {
            if stream.file.is_some() {
                let _ = std::fs::remove_file(&stream.path);
            }
        }
    }
}

impl Stream {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            buffer: None,
            filled: 0,
            offset: HEADER_BYTES as u64,
            block: Xxh3::new(),
            in_block: 0,
            held: LayerRows::default(),
        }
    }

    fn append(&mut self, mut bytes: &[u8], disk: &mut Disk) -> Result<()> {
        while !bytes.is_empty() {
            if self.file.is_none() {
                let file = create(&self.path).map_err(|error| Error::io(&self.path, "creating", error))?;
                // For `remove_torn`; a file system without locks does without.
                let _ = file.try_lock();
                self.file = Some(Arc::new(file));
            }
            let mut buffer = match self.buffer.take() {
                Some(buffer) => buffer,
                None => disk.buffer()?,
            };
            // Up to the end of the buffer or of the block under one checksum, whichever comes first.
            let taken = PIECE_BYTES.min(bytes.len()).min(buffer.len() - self.filled).min(BLOCK_BYTES - self.in_block);
            let (now, later) = bytes.split_at(taken);
            buffer[self.filled..self.filled + taken].copy_from_slice(now);
            self.block.update(&buffer[self.filled..self.filled + taken]);
            self.filled += taken;
            self.in_block += taken;
            if self.in_block == BLOCK_BYTES {
                self.close_block();
            }
            if self.filled == buffer.len() {
                self.send(buffer, disk)?;
            } else {
                self.buffer = Some(buffer);
            }
            bytes = later;
        }
        Ok(())
    }

    fn close_block(&mut self) {
        self.held.blocks.push(self.block.digest());
        self.block.reset();
        self.in_block = 0;
    }

    fn send(&mut self, buffer: Aligned, disk: &mut Disk) -> Result<()> {
        let file = Arc::clone(self.file.as_ref().expect("a buffer is filled behind its file's creation"));
        let job = Job { file, path: self.path.clone(), offset: self.offset, buffer, length: self.filled };
        self.offset += self.filled as u64;
        self.filled = 0;
        disk.send(job)
    }

    fn flush(&mut self, disk: &mut Disk) -> Result<()> {
        if self.in_block > 0 {
            self.close_block();
        }
        match self.buffer.take() {
            Some(buffer) => self.send(buffer, disk),
            None => Ok(()),
        }
    }
}

struct Job {
    file: Arc<File>,
    path: PathBuf,
    offset: u64,
    buffer: Aligned,
    length: usize,
}

/// The thread that writes, and the buffers that go to it and come back.
struct Disk {
    jobs: Option<Sender<Job>>,
    free: Receiver<Aligned>,
    /// Buffers that were not made yet.
    unmade: usize,
    buffer_bytes: usize,
    thread: Option<JoinHandle<Result<()>>>,
    has_failed: bool,
}

impl Disk {
    fn new(num_buffers: usize, buffer_bytes: usize) -> Self {
        let (jobs, work) = channel::<Job>();
        let (give, free) = channel();
        let thread = std::thread::spawn(move || {
            for mut job in work {
                // Past the page cache only whole pages can be written; what is behind the rows is cut off in the end.
                let end = job.length.next_multiple_of(PAGE);
                job.buffer[job.length..end].fill(0);
                write_at(&job.file, &job.buffer[..end], job.offset)
                    .map_err(|error| Error::io(&job.path, "writing", error))?;
                // Nobody takes it back when the unit is finished.
                let _ = give.send(job.buffer);
            }
            Ok(())
        });
        Self { jobs: Some(jobs), free, unmade: num_buffers, buffer_bytes, thread: Some(thread), has_failed: false }
    }

    /// An empty buffer, as soon as there is one: so the memory is bounded, and the caller no faster than the disk.
    fn buffer(&mut self) -> Result<Aligned> {
        if let Ok(buffer) = self.free.try_recv() {
            return Ok(buffer);
        }
        if self.unmade > 0 {
            self.unmade -= 1;
            return Ok(Aligned::new(self.buffer_bytes));
        }
        match self.free.recv() {
            Ok(buffer) => Ok(buffer),
            Err(_) => Err(self.failure()),
        }
    }

    fn send(&mut self, job: Job) -> Result<()> {
        match self.jobs.as_ref().map(|jobs| jobs.send(job)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// Wait until everything is written.
    fn wait(&mut self) -> Result<()> {
        self.jobs = None;
        let result = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::input("the thread that writes activations has panicked")),
            None if self.has_failed => Err(Error::input("rows of this unit could not be written; begin it again")),
            None => Ok(()),
        };
        self.has_failed = result.is_err();
        result
    }

    fn failure(&mut self) -> Error {
        self.wait().expect_err("a thread ends before its work only where it fails")
    }
}
