//! What a restart would find: the books as the ledger's records make them.

use super::{books::Books, record::Record, records::records, restore::replay, state::State};

/// The books as the records so far make them. The owner keeps them beside the state, so that rewriting the ledger does
/// not need the state's lock.
#[derive(Clone, Debug)]
pub struct Recorded {
    books: Books,
}

impl Recorded {
    /// What the shortest ledger of this state makes.
    ///
    /// # Errors
    /// Says what a record contradicts: always a bug of the core.
    pub fn of(state: &State) -> Result<Self, String> {
        let mut recorded = Self {
            books: state.books.blank(),
        };
        let mut all = state.records().into_iter();
        all.try_for_each(|record| recorded.add(record))?;
        Ok(recorded)
    }

    /// A record more.
    ///
    /// # Errors
    /// Says what it contradicts: always a bug of the core.
    pub fn add(&mut self, record: Record) -> Result<(), String> {
        replay(&mut self.books, record)
    }

    /// The shortest ledger that restores this.
    pub fn records(&self) -> Vec<Record> {
        records(&self.books)
    }
}
