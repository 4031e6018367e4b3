//! Things that refer to each other by small typed keys instead of pointers.

use std::{
    cmp::Ordering,
    fmt,
    marker::PhantomData,
    ops::{Index, IndexMut},
};

/// What keys of regions are of.
#[derive(Clone, Copy, Debug)]
pub(super) enum OfRegion {}
/// What keys of leases are of.
#[derive(Clone, Copy, Debug)]
pub(super) enum OfLease {}
/// What keys of namespaces are of.
#[derive(Clone, Copy, Debug)]
pub(super) enum OfNamespace {}

pub(super) type RegionKey = Key<OfRegion>;
pub(super) type LeaseKey = Key<OfLease>;
pub(super) type NamespaceKey = Key<OfNamespace>;

/// Names one entry of an [`Arena`]. Valid until the entry is removed; never handed out of the core.
pub(super) struct Key<Of> {
    place: u32,
    of: PhantomData<fn() -> Of>,
}

impl<Of> Key<Of> {
    /// No key is less.
    pub(super) const LEAST: Self = Self {
        place: 0,
        of: PhantomData,
    };

    fn at(place: u32) -> Self {
        Self {
            place,
            of: PhantomData,
        }
    }
}

impl<Of> Clone for Key<Of> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Of> Copy for Key<Of> {}

impl<Of> PartialEq for Key<Of> {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place
    }
}

impl<Of> Eq for Key<Of> {}

impl<Of> PartialOrd for Key<Of> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<Of> Ord for Key<Of> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place.cmp(&other.place)
    }
}

impl<Of> fmt::Debug for Key<Of> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.place)
    }
}

/// Entries under keys; a removed entry's key is used again.
#[derive(Clone, Debug)]
pub(super) struct Arena<Of, T> {
    beside: Beside<Of, T>,
    vacant: Vec<u32>,
}

impl<Of, T> Default for Arena<Of, T> {
    fn default() -> Self {
        Self {
            beside: Beside::default(),
            vacant: Vec::new(),
        }
    }
}

impl<Of, T> Arena<Of, T> {
    pub(super) fn len(&self) -> usize {
        self.beside.entries.len() - self.vacant.len()
    }

    pub(super) fn insert(&mut self, entry: T) -> Key<Of> {
        let place = self.vacant.pop().unwrap_or_else(|| {
            u32::try_from(self.beside.entries.len())
                .expect("limits keep arenas far below 2^32 entries")
        });
        let key = Key::at(place);
        self.beside.insert(key, entry);
        key
    }

    pub(super) fn remove(&mut self, key: Key<Of>) -> T {
        self.vacant.push(key.place);
        self.beside
            .remove(key)
            .expect("a key is valid until its entry is removed")
    }

    pub(super) fn get(&self, key: Key<Of>) -> Option<&T> {
        self.beside.get(key)
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key<Of>, &T)> {
        self.beside.iter()
    }
}

impl<Of, T> Index<Key<Of>> for Arena<Of, T> {
    type Output = T;

    fn index(&self, key: Key<Of>) -> &T {
        &self.beside[key]
    }
}

impl<Of, T> IndexMut<Key<Of>> for Arena<Of, T> {
    fn index_mut(&mut self, key: Key<Of>) -> &mut T {
        &mut self.beside[key]
    }
}

/// What somebody else keeps about the entries of an [`Arena`].
#[derive(Clone, Debug)]
pub(super) struct Beside<Of, T> {
    entries: Vec<Option<T>>,
    of: PhantomData<fn() -> Of>,
}

impl<Of, T> Default for Beside<Of, T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            of: PhantomData,
        }
    }
}

impl<Of, T> Beside<Of, T> {
    pub(super) fn insert(&mut self, key: Key<Of>, entry: T) {
        let place = key.place as usize;
        if self.entries.len() <= place {
            self.entries.resize_with(place + 1, || None);
        }
        self.entries[place] = Some(entry);
    }

    pub(super) fn remove(&mut self, key: Key<Of>) -> Option<T> {
        self.entries.get_mut(key.place as usize)?.take()
    }

    pub(super) fn get(&self, key: Key<Of>) -> Option<&T> {
        self.entries.get(key.place as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, key: Key<Of>) -> Option<&mut T> {
        self.entries.get_mut(key.place as usize)?.as_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key<Of>, &T)> {
        let entries = (0..).zip(&self.entries);
        entries.filter_map(|(place, entry)| Some((Key::at(place), entry.as_ref()?)))
    }
}

impl<Of, T> Index<Key<Of>> for Beside<Of, T> {
    type Output = T;

    fn index(&self, key: Key<Of>) -> &T {
        self.get(key)
            .expect("a key is valid until its entry is removed")
    }
}

impl<Of, T> IndexMut<Key<Of>> for Beside<Of, T> {
    fn index_mut(&mut self, key: Key<Of>) -> &mut T {
        self.get_mut(key)
            .expect("a key is valid until its entry is removed")
    }
}
