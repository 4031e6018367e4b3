//! Things that refer to each other by small typed keys instead of pointers.

use std::{
    cmp::Ordering,
    fmt,
    marker::PhantomData,
    ops::{Index, IndexMut},
};

/// Names one entry of an [`Arena<T>`]. Valid until the entry is removed; never handed out of the core.
pub(super) struct Key<T> {
    place: u32,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Key<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Key<T> {}

impl<T> PartialEq for Key<T> {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place
    }
}

impl<T> Eq for Key<T> {}

impl<T> PartialOrd for Key<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Key<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place.cmp(&other.place)
    }
}

impl<T> fmt::Debug for Key<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.place)
    }
}

/// Entries under keys; a removed entry's key is used again.
#[derive(Clone, Debug)]
pub(super) struct Arena<T> {
    entries: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            vacant: Vec::new(),
        }
    }
}

impl<T> Arena<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }

    pub(super) fn insert(&mut self, entry: T) -> Key<T> {
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            u32::try_from(self.entries.len() - 1)
                .expect("limits keep arenas far below 2^32 entries")
        });
        self.entries[place as usize] = Some(entry);
        Key {
            place,
            of: PhantomData,
        }
    }

    pub(super) fn remove(&mut self, key: Key<T>) -> T {
        self.vacant.push(key.place);
        self.entries[key.place as usize]
            .take()
            .expect("a key is valid until its entry is removed")
    }

    pub(super) fn get(&self, key: Key<T>) -> Option<&T> {
        self.entries.get(key.place as usize)?.as_ref()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key<T>, &T)> {
        (0..).zip(&self.entries).filter_map(|(place, entry)| {
            let key = Key {
                place,
                of: PhantomData,
            };
            entry.as_ref().map(|entry| (key, entry))
        })
    }
}

impl<T> Index<Key<T>> for Arena<T> {
    type Output = T;

    fn index(&self, key: Key<T>) -> &T {
        self.entries[key.place as usize]
            .as_ref()
            .expect("a key is valid until its entry is removed")
    }
}

impl<T> IndexMut<Key<T>> for Arena<T> {
    fn index_mut(&mut self, key: Key<T>) -> &mut T {
        self.entries[key.place as usize]
            .as_mut()
            .expect("a key is valid until its entry is removed")
    }
}
