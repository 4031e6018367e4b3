//! What an engine has lent, loan by loan: out, asked back, back in part, back.
//!
//! One state machine for both who keep loans: an engine's scheduler, to which a loan is back when it is back on all of the
//! engine's workers, and a worker, whose part of a loan is memory ([`PoolLender`](super::PoolLender)). Loans have numbers that
//! the engine gives them. No clock and no I/O: a [`Moment`] is the time since whatever beginning the caller chose.

use std::{collections::BTreeMap, time::Duration};

/// The time since a beginning that the caller chose.
pub type Moment = Duration;

/// What giving back may take beyond the time that borrowers have to move their blocks away: copies under way, and a few
/// messages.
pub const GIVE_BACK_MARGIN: Duration = Duration::from_secs(1);

/// An engine's loans. `T` is what its owner wants to know about each.
#[derive(Debug)]
pub struct Loans<T> {
    /// Of how many parts each loan is: one on each worker.
    parts: u32,
    loans: BTreeMap<u64, Loan<T>>,
}

#[derive(Debug)]
struct Loan<T> {
    what: T,
    asked_back: Option<Moment>,
    /// Parts that are back.
    back: u32,
}

/// A loan that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended<T> {
    /// The engine's number.
    pub number: u64,
    /// What its owner knows about it.
    pub what: T,
    /// From asking for it to having it; none for one that came back unasked.
    pub took: Option<Duration>,
}

impl<T> Loans<T> {
    /// No loans as yet. Each is of `parts` parts.
    pub fn new(parts: u32) -> Self {
        Self {
            parts,
            loans: BTreeMap::new(),
        }
    }

    /// A new loan. False when one of that number is not over yet; nothing is changed then.
    pub fn insert(&mut self, number: u64, what: T) -> bool {
        let vacant = !self.loans.contains_key(&number);
        if vacant {
            let loan = Loan {
                what,
                asked_back: None,
                back: 0,
            };
            self.loans.insert(number, loan);
        }
        vacant
    }

    /// What its owner knows about a loan that is not over.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.loans.get_mut(&number).map(|loan| &mut loan.what)
    }

    /// Every loan that is not over, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        (self.loans.iter()).map(|(number, loan)| (*number, &loan.what))
    }

    /// Every loan that is not over, in the order of their numbers.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        (self.loans.iter_mut()).map(|(number, loan)| (*number, &mut loan.what))
    }

    /// Asks for a loan back. False when that changes nothing: there is none of that number, or it has been asked back.
    pub fn ask_back(&mut self, number: u64, now: Moment) -> bool {
        let out = |loan: &&mut Loan<T>| loan.asked_back.is_none();
        let loan = self.loans.get_mut(&number).filter(out);
        loan.map(|loan| loan.asked_back = Some(now)).is_some()
    }

    /// Whether a loan has been asked back and is not over.
    pub fn is_asked_back(&self, number: u64) -> bool {
        (self.loans.get(&number)).is_some_and(|loan| loan.asked_back.is_some())
    }

    /// Loans of which a part came back unasked. The others' is no use without it.
    pub fn broken(&self) -> Vec<u64> {
        let broken = |loan: &Loan<T>| loan.back > 0 && loan.asked_back.is_none();
        let loans = self.loans.iter().filter(|(_, loan)| broken(loan));
        loans.map(|(number, _)| *number).collect()
    }

    /// So many more parts of a loan are back. Returns the loan if it is over with that. A number that is not out is about a
    /// loan of before, and changes nothing.
    pub fn came_back(&mut self, number: u64, parts: u32, now: Moment) -> Option<Ended<T>> {
        let loan = self.loans.get_mut(&number)?;
        loan.back = loan.back.saturating_add(parts);
        if loan.back < self.parts {
            return None;
        }
        let loan = self.loans.remove(&number)?;
        Some(Ended {
            number,
            what: loan.what,
            took: loan.asked_back.map(|asked| now.saturating_sub(asked)),
        })
    }

    /// Whether anything that was asked back at most `patience` ago is not back yet.
    pub fn is_awaited(&self, now: Moment, patience: Duration) -> bool {
        let mut asked = self.loans.values().filter_map(|loan| loan.asked_back);
        asked.any(|at| now.saturating_sub(at) <= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn numbers(loans: &Loans<&str>) -> Vec<u64> {
        loans.iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn a_loan_is_back_when_all_of_its_parts_are() {
        let mut loans = Loans::new(3);
        assert!(loans.insert(7, "blocks"));
        assert!(!loans.insert(7, "others"), "it is not over");
        assert!(loans.ask_back(7, S) && !loans.ask_back(7, 2 * S) && loans.is_asked_back(7));
        assert_eq!(loans.came_back(7, 2, 2 * S), None);
        let ended = loans.came_back(7, 1, 4 * S);
        let (number, what, took) = (7, "blocks", Some(3 * S));
        assert_eq!(ended, Some(Ended { number, what, took }));
        assert_eq!(
            loans.came_back(7, 3, 5 * S),
            None,
            "a late word about what is over"
        );
        assert!(numbers(&loans).is_empty() && loans.insert(7, "again"));
    }

    #[test]
    fn a_part_that_comes_back_unasked_breaks_its_loan() {
        let mut loans = Loans::new(2);
        loans.insert(1, "a");
        loans.insert(2, "b");
        assert_eq!(loans.came_back(1, 1, S), None);
        assert_eq!(loans.broken(), [1]);
        assert!(
            loans.ask_back(1, S) && loans.broken().is_empty(),
            "it is asked back once"
        );
        assert!(
            loans
                .came_back(1, 1, 2 * S)
                .is_some_and(|ended| ended.took == Some(S))
        );
        assert!(
            loans
                .came_back(2, 2, S)
                .is_some_and(|ended| ended.took.is_none())
        );
    }

    #[test]
    fn nobody_waits_for_ever() {
        let mut loans = Loans::new(1);
        loans.insert(1, "a");
        assert!(!loans.is_awaited(S, 9 * S), "nobody has asked for it");
        assert!(!loans.ask_back(2, S), "there is none");
        loans.ask_back(1, S);
        assert!(loans.is_awaited(4 * S, 3 * S));
        assert!(!loans.is_awaited(4 * S + Duration::from_millis(1), 3 * S));
        assert!(loans.came_back(1, 1, 9 * S).is_some() && !loans.is_awaited(2 * S, 3 * S));
    }

    #[test]
    fn an_owner_finds_what_it_knows() {
        let mut loans = Loans::new(1);
        loans.insert(2, "b");
        loans.insert(1, "a");
        assert_eq!(numbers(&loans), [1, 2]);
        if let Some(what) = loans.get_mut(2) {
            *what = "c";
        }
        assert_eq!(
            loans.iter_mut().map(|(_, what)| *what).collect::<Vec<_>>(),
            ["a", "c"]
        );
        assert!(loans.get_mut(3).is_none() && !loans.is_asked_back(3));
    }
}
