//! `Loans`: what an engine lends, as its scheduler keeps it.

use std::{collections::BTreeMap, time::Duration};

use parking_lot::Mutex;
use pyo3::prelude::*;
use swiftcache_client::donor::{self, Ended, GIVE_BACK_MARGIN, Moment};

use crate::{
    arguments,
    failure::{Failure, Result},
    gil::at_once,
};

/// What an engine lends, over all of its workers.
#[pyclass(frozen, module = "swiftcache")]
#[derive(Debug)]
pub(crate) struct Loans {
    state: Mutex<State>,
    /// How long giving back may take.
    patience: Duration,
}

#[derive(Debug)]
struct State {
    loans: donor::Loans<()>,
    next: u64,
}

#[pymethods]
impl Loans {
    #[new]
    #[pyo3(signature = (*, workers, drain_ms))]
    fn new(workers: &Bound<'_, PyAny>, drain_ms: &Bound<'_, PyAny>) -> PyResult<Self> {
        let workers: u32 = arguments::number("workers", workers)?;
        let drain = arguments::milliseconds(arguments::number("drain_ms", drain_ms)?);
        at_once(|| {
            if workers == 0 {
                return Err(Failure::argument("workers", "takes at least one"));
            }
            let loans = donor::Loans::new(workers);
            Ok(Self {
                state: Mutex::new(State { loans, next: 0 }),
                patience: drain + GIVE_BACK_MARGIN,
            })
        })
    }

    #[getter]
    fn patience(&self) -> f64 {
        self.patience.as_secs_f64()
    }

    fn lend(&self) -> PyResult<u64> {
        at_once(|| {
            let mut state = self.state.lock();
            let number = state.next;
            state.next += 1;
            state.loans.insert(number, ());
            Ok(number)
        })
    }

    fn ask_back(&self, loans: &Bound<'_, PyAny>, now: f64) -> PyResult<Vec<u64>> {
        let mut wanted: Vec<u64> = arguments::number("loans", loans)?;
        at_once(|| {
            let now = moment(now)?;
            let loans = &mut self.state.lock().loans;
            wanted.extend(loans.broken());
            wanted.retain(|number| loans.ask_back(*number, now));
            Ok(wanted)
        })
    }

    fn came_back(&self, parts: BTreeMap<u64, u32>, now: f64) -> PyResult<Vec<(u64, Option<f64>)>> {
        at_once(|| {
            let now = moment(now)?;
            let loans = &mut self.state.lock().loans;
            let ended =
                (parts.iter()).filter_map(|(number, parts)| loans.came_back(*number, *parts, now));
            let told = |ended: Ended<()>| (ended.number, ended.took.map(|took| took.as_secs_f64()));
            Ok(ended.map(told).collect())
        })
    }

    fn out(&self) -> PyResult<(Vec<u64>, Vec<u64>)> {
        at_once(|| {
            let loans = &self.state.lock().loans;
            let numbers = loans.iter().map(|(number, ())| number);
            Ok(numbers.partition(|number| !loans.is_asked_back(*number)))
        })
    }

    fn is_awaited(&self, now: f64) -> PyResult<bool> {
        at_once(|| {
            let now = moment(now)?;
            Ok(self.state.lock().loans.is_awaited(now, self.patience))
        })
    }
}

fn moment(now: f64) -> Result<Moment> {
    Duration::try_from_secs_f64(now).map_err(|problem| Failure::argument("now", problem))
}
