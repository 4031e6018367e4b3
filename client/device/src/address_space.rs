//! Ranges of addresses whose bytes come from several memories and can change their place.
//!
//! An [`AddressSpace`] is reserved once and keeps its addresses. Whole memories are mapped in it side by side: HBM of its
//! device, a peer's HBM that was imported by descriptor, host memory. [`Standstill::replace`] puts other memories in the
//! place of some of them, so that bytes move while whoever reads them, such as a captured graph, keeps its addresses.

use std::{collections::BTreeMap, fmt, sync::Arc};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;

use crate::{DeviceError, Memory, Result};

/// What a backend offers for address spaces.
pub trait AddressSpaces: Send + Sync {
    /// Every piece of a space of `device` starts and ends at a multiple of this, bytes.
    ///
    /// # Errors
    /// When the device is unknown.
    fn granularity(&self, device: &DeviceUuid) -> Result<u64>;

    /// Reserves `bytes` of addresses for `device`. Nothing is mapped there, and no memory is taken.
    ///
    /// # Errors
    /// When `bytes` is 0 or no multiple of the granularity, or the process has no such range of addresses left.
    fn reserve(&self, device: &DeviceUuid, bytes: u64) -> Result<Arc<AddressSpace>>;

    /// Takes `bytes` of zeroed host memory near `device` that can be mapped in a space. This is slow on CUDA (200 ms for
    /// 1 GiB), so take it at start.
    ///
    /// # Errors
    /// When `bytes` is 0 or no multiple of the granularity, or there is no room.
    fn allocate_host_piece(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory>;

    /// Checks that a memory can be mapped in a space of `device`, as far as its kind goes.
    ///
    /// # Errors
    /// When it cannot, and says which memory can.
    fn accepts(&self, device: &DeviceUuid, memory: &Memory) -> Result<()>;
}

/// A backend's range of addresses. A call that fails has changed nothing.
pub(crate) trait RawSpace: fmt::Debug + Send + Sync {
    fn device(&self) -> &DeviceUuid;
    fn address(&self) -> u64;
    fn bytes(&self) -> u64;
    fn granularity(&self) -> u64;

    /// Checks that the backend can map a memory, all of it.
    fn accept(&self, memory: &Memory) -> Result<()>;

    /// Maps a memory where nothing is mapped. Nobody can touch it there yet.
    ///
    /// # Safety
    /// The memory was accepted, the range lies inside, nothing is mapped there, and the memory outlives the mapping.
    unsafe fn map(&self, offset: u64, memory: &Memory) -> Result<()>;

    /// Lets the device touch what was mapped.
    ///
    /// # Safety
    /// Something of this size is mapped at this offset.
    unsafe fn open(&self, offset: u64, bytes: u64) -> Result<()>;

    /// Undoes [`map`](Self::map).
    ///
    /// # Safety
    /// Something of this size is mapped at this offset, and nobody touches it.
    unsafe fn unmap(&self, offset: u64, bytes: u64) -> Result<()>;

    /// Memory that copies of the device can use: a range that these pieces cover.
    fn memory(&self, offset: u64, bytes: u64, pieces: &[Memory]) -> Memory;
}

/// A range of addresses of one device. It is given back when the last handle to it and to memory of it is gone.
pub struct AddressSpace {
    raw: Box<dyn RawSpace>,
    table: Mutex<Table>,
}

/// What is mapped, by offset. No two pieces overlap.
type Table = BTreeMap<u64, Mapped>;

#[derive(Clone)]
struct Mapped {
    memory: Memory,
    /// Whether the device may touch it.
    open: bool,
}

/// What is mapped at one place of a space.
#[derive(Clone, Debug)]
pub struct SpacePiece {
    /// Where it starts in the space, bytes.
    pub offset: u64,
    /// What is mapped there, whole.
    pub memory: Memory,
    /// Whether the device may touch it. It always may, but after a failure: see [`Left::Closed`].
    pub open: bool,
}

/// A memory to put in the place of another one.
#[derive(Clone, Debug)]
pub struct Change {
    /// Where the piece starts whose place it takes, bytes.
    pub offset: u64,
    /// What is to be mapped there: as large as the piece.
    pub memory: Memory,
}

/// What a place has after a change that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// What was there before.
    Old,
    /// The new memory: it could not be taken away again.
    New,
    /// Nothing: neither could be mapped. [`AddressSpace::map`] fills the place.
    Nothing,
    /// One of the two, and the device may not touch it. [`AddressSpace::pieces`] says which. `replace` and `unmap` work
    /// there as usual.
    Closed,
}

/// Not every change was done.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}; {}", said(left))]
pub struct NotReplaced {
    /// What failed first.
    pub error: DeviceError,
    /// What each place has now, in the order of the changes.
    pub left: Vec<Left>,
}

impl NotReplaced {
    /// Whether everything is as it was before.
    pub fn is_undone(&self) -> bool {
        self.left.iter().all(|left| *left == Left::Old)
    }
}

fn said(left: &[Left]) -> String {
    let count = |kind| left.iter().filter(|left| **left == kind).count();
    if count(Left::Old) == left.len() {
        return "every piece is as it was".to_owned();
    }
    format!(
        "of {} pieces {} are as they were, {} are replaced, {} are gone, and {} cannot be touched",
        left.len(),
        count(Left::Old),
        count(Left::New),
        count(Left::Nothing),
        count(Left::Closed),
    )
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, device) = (self.raw.bytes(), self.raw.device());
        write!(f, "AddressSpace({bytes} bytes on {device})")
    }
}

impl AddressSpace {
    pub(crate) fn new(raw: Box<dyn RawSpace>) -> Arc<Self> {
        let table = Mutex::default();
        Arc::new(Self { raw, table })
    }

    /// The device whose work may touch it.
    pub fn device(&self) -> &DeviceUuid {
        self.raw.device()
    }

    /// Its first address, for an engine that computes in it.
    pub fn address(&self) -> u64 {
        self.raw.address()
    }

    /// Its size, bytes.
    pub fn bytes(&self) -> u64 {
        self.raw.bytes()
    }

    /// Pieces start and end at multiples of this, bytes.
    pub fn granularity(&self) -> u64 {
        self.raw.granularity()
    }

    /// What is mapped now, by offset.
    pub fn pieces(&self) -> Vec<SpacePiece> {
        let table = self.table.lock();
        let pieces = table.iter().map(|(offset, mapped)| SpacePiece {
            offset: *offset,
            memory: mapped.memory.clone(),
            open: mapped.open,
        });
        pieces.collect()
    }

    /// Maps a memory, all of it, where nothing is mapped. The space keeps it as long as it is mapped.
    ///
    /// # Errors
    /// When the memory cannot be mapped (that of legacy handles cannot) or is mapped here already, when the place is taken
    /// or odd, or when the driver refuses. Nothing has changed then. Only if the driver does not take back what it has begun,
    /// the memory is mapped and [closed](SpacePiece::open).
    pub fn map(&self, offset: u64, memory: &Memory) -> Result<()> {
        let mut table = self.table.lock();
        self.check(&table, offset, memory)?;
        let last = table.range(..offset + memory.bytes()).next_back();
        if let Some((at, mapped)) = last
            && at + mapped.memory.bytes() > offset
        {
            let bytes = mapped.memory.bytes();
            return Err(self.refuse(format!("{bytes} bytes at {at} are mapped already")));
        }
        self.put(&mut table, offset, memory)
    }

    /// Takes a promise that lets pieces be unmapped and replaced.
    ///
    /// # Safety
    /// As long as the result lives, nothing touches a piece that is unmapped or replaced with it: neither a copy with
    /// [`memory`](Self::memory) of the space, nor work of an engine that has its address. What was queued before is over.
    /// Nothing touches a piece that was unmapped later either, until something is mapped there again. Whoever is given the result
    /// keeps to that, with its own copies too.
    pub unsafe fn stand_still(&self) -> Standstill<'_> {
        Standstill { space: self }
    }

    /// A range as memory that copies of the device can use. It keeps the space, but not what is mapped there: whoever unmaps
    /// promises that it is not used.
    ///
    /// # Errors
    /// When a part of the range is outside, not mapped, or closed.
    pub fn memory(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<Memory> {
        let table = self.table.lock();
        let end = (offset.checked_add(bytes)).filter(|end| *end <= self.raw.bytes());
        let end = end.ok_or_else(|| self.outside(offset, bytes))?;
        let first = table
            .range(..=offset)
            .next_back()
            .map_or(offset, |(at, _)| *at);
        let mut reached = offset;
        let mut pieces = Vec::new();
        for (at, mapped) in table.range(first..end) {
            let last = at + mapped.memory.bytes();
            if *at <= reached && last > reached && mapped.open {
                reached = last;
                pieces.push(mapped.memory.clone());
            }
        }
        if reached < end || bytes == 0 {
            return Err(self.refuse(format!(
                "of {bytes} bytes at {offset}, those from {reached} on are not mapped"
            )));
        }
        let memory = self.raw.memory(offset, bytes, &pieces);
        memory.keep(Box::new(Arc::clone(self)));
        Ok(memory)
    }

    /// Checks a memory that is to be mapped at `offset`, but for what is mapped there.
    fn check(&self, table: &Table, offset: u64, memory: &Memory) -> Result<()> {
        self.raw.accept(memory)?;
        let (unit, bytes) = (self.raw.granularity(), memory.bytes());
        if bytes == 0 || !offset.is_multiple_of(unit) || !bytes.is_multiple_of(unit) {
            return Err(self.refuse(format!(
                "{bytes} bytes at {offset}: pieces start and end at multiples of {unit}"
            )));
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.raw.bytes() => {}
            _ => return Err(self.outside(offset, bytes)),
        }
        match table.iter().find(|(_, mapped)| mapped.memory.is(memory)) {
            None => Ok(()),
            Some((at, _)) => Err(self.refuse(format!("this memory is mapped at {at} already"))),
        }
    }

    /// Checks changes, and returns what is mapped in their places.
    fn check_changes(&self, table: &Table, changes: &[Change]) -> Result<Vec<Memory>> {
        let checked = changes.iter().enumerate().map(|(at, change)| {
            self.check(table, change.offset, &change.memory)?;
            let old = table
                .get(&change.offset)
                .ok_or_else(|| self.absent(change.offset))?;
            let (new, old) = (&change.memory, &old.memory);
            if new.bytes() != old.bytes() {
                return Err(self.refuse(format!(
                    "the piece at {} has {} bytes, and the new memory {}",
                    change.offset,
                    old.bytes(),
                    new.bytes()
                )));
            }
            let twice = |other: &Change| other.offset == change.offset || other.memory.is(new);
            if changes[..at].iter().any(twice) {
                return Err(self.refuse(format!(
                    "the piece at {} or its new memory is named twice",
                    change.offset
                )));
            }
            Ok(old.clone())
        });
        checked.collect()
    }

    /// Puts a memory in the place of `old`, which is mapped there; or says what is there now.
    ///
    /// # Safety
    /// Nobody touches the piece.
    unsafe fn exchange(
        &self,
        table: &mut Table,
        change: &Change,
        old: &Memory,
    ) -> std::result::Result<(), (DeviceError, Left)> {
        let before = |table: &Table| match table.get(&change.offset) {
            None => Left::Nothing,
            Some(mapped) if !mapped.open => Left::Closed,
            Some(_) => Left::Old,
        };
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { self.take(table, change.offset) } {
            return Err((error, before(table)));
        }
        let Err(error) = self.put(table, change.offset, &change.memory) else {
            return Ok(());
        };
        if !table.contains_key(&change.offset) {
            // Its failure is no news: the first one is what matters, and the table says what is there.
            let _ = self.put(table, change.offset, old);
        }
        Err((error, before(table)))
    }

    /// Maps a memory where nothing is mapped.
    fn put(&self, table: &mut Table, offset: u64, memory: &Memory) -> Result<()> {
        let bytes = memory.bytes();
        // SAFETY: every caller has checked the memory and the place; the table keeps the memory until it is unmapped.
        unsafe { self.raw.map(offset, memory) }?;
        // SAFETY: it was mapped a moment ago.
        let opened = unsafe { self.raw.open(offset, bytes) };
        let open = opened.is_ok();
        // SAFETY: it is mapped, and nobody could touch it yet.
        if open || unsafe { self.raw.unmap(offset, bytes) }.is_err() {
            let memory = memory.clone();
            table.insert(offset, Mapped { memory, open });
        }
        opened
    }

    /// Unmaps a piece.
    ///
    /// # Safety
    /// Nobody touches it.
    unsafe fn take(&self, table: &mut Table, offset: u64) -> Result<Memory> {
        let mapped = table.get(&offset).cloned();
        let memory = mapped.ok_or_else(|| self.absent(offset))?.memory;
        // SAFETY: it is mapped, and the caller promises that nobody touches it.
        unsafe { self.raw.unmap(offset, memory.bytes()) }?;
        table.remove(&offset);
        Ok(memory)
    }

    fn refuse(&self, problem: String) -> DeviceError {
        DeviceError::Failed {
            operation: "using an address space",
            device: self.raw.device().clone(),
            problem,
        }
    }

    fn absent(&self, offset: u64) -> DeviceError {
        self.refuse(format!("no piece starts at {offset}"))
    }

    fn outside(&self, offset: u64, bytes: u64) -> DeviceError {
        DeviceError::OutOfRange {
            offset,
            bytes,
            size: self.raw.bytes(),
        }
    }
}

/// A promise that nobody touches what is unmapped or replaced with it.
#[derive(Debug)]
pub struct Standstill<'a> {
    space: &'a AddressSpace,
}

impl Standstill<'_> {
    /// Unmaps the piece that starts at `offset`, and returns its memory.
    ///
    /// # Errors
    /// When no piece starts there, or the driver refuses. The piece is still mapped then.
    pub fn unmap(&self, offset: u64) -> Result<Memory> {
        let mut table = self.space.table.lock();
        // SAFETY: nobody touches it, as whoever made the standstill promised.
        unsafe { self.space.take(&mut table, offset) }
    }

    /// Puts other memories in the place of pieces: all of them or none, if the driver lets it. Returns what was mapped
    /// there before. The bytes do not move: copy them first.
    ///
    /// # Errors
    /// Nothing has changed if a change is odd. If the driver refuses a step, what was done is undone. Where the driver
    /// refuses that too, [`NotReplaced::left`] says what is there now; the other places are undone all the same.
    pub fn replace(&self, changes: &[Change]) -> std::result::Result<Vec<Memory>, NotReplaced> {
        let space = self.space;
        let mut table = space.table.lock();
        let old = space
            .check_changes(&table, changes)
            .map_err(|error| NotReplaced {
                error,
                left: vec![Left::Old; changes.len()],
            })?;
        let mut left = vec![Left::Old; changes.len()];
        for (at, change) in changes.iter().enumerate() {
            // SAFETY: nobody touches the piece, as whoever made the standstill promised.
            let outcome = unsafe { space.exchange(&mut table, change, &old[at]) };
            let Err((error, now)) = outcome else {
                left[at] = Left::New;
                continue;
            };
            left[at] = now;
            for done in (0..at).rev() {
                let back = Change {
                    offset: changes[done].offset,
                    memory: old[done].clone(),
                };
                // SAFETY: as above.
                let undone = unsafe { space.exchange(&mut table, &back, &changes[done].memory) };
                // Seen from there, what the exchange was to bring is old and what was there is new.
                left[done] = match undone {
                    Ok(()) => Left::Old,
                    Err((_, Left::Old)) => Left::New,
                    Err((_, now)) => now,
                };
            }
            return Err(NotReplaced { error, left });
        }
        Ok(old)
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        let table = std::mem::take(self.table.get_mut());
        for (offset, mapped) in table {
            // SAFETY: it is mapped. Whoever could copy in it would hold the space, and an engine that computes in it keeps
            // it too.
            let unmapped = unsafe { self.raw.unmap(offset, mapped.memory.bytes()) };
            if let Err(error) = unmapped {
                tracing::debug!(%error, offset, "while letting go of an address space");
            }
        }
    }
}

#[cfg(test)]
mod tests;
