//! Python arguments, checked: what does not fit is a `ValueError` that names the argument.

use std::{str::FromStr, time::Duration};

use pyo3::{
    exceptions::{PyOverflowError, PyTypeError},
    prelude::*,
};
use swiftcache_proto::domain::{BlockHash, BorrowerId};

use crate::failure::{Failure, Result};

/// Bytes of a block hash.
const HASH_BYTES: usize = 16;
/// The longest wait: a year is for ever.
const LONGEST_SECONDS: f64 = 366.0 * 24.0 * 3600.0;

/// A number, or a structure of them, that has to fit its type.
pub(crate) fn number<'py, T>(argument: &str, value: &Bound<'py, PyAny>) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py>,
{
    let extracted: std::result::Result<T, _> = value.extract();
    extracted.map_err(|error| {
        let error: PyErr = error.into();
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            Failure::argument(
                argument,
                format!("{value} does not fit: {}", error.value(value.py())),
            )
            .into()
        } else if error.is_instance_of::<PyTypeError>(value.py()) {
            let problem = error.value(value.py());
            PyTypeError::new_err(format!("argument '{argument}': {problem}"))
        } else {
            error
        }
    })
}

/// Such a number, if it is given.
pub(crate) fn optional<'py, T>(
    argument: &str,
    value: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<T>>
where
    T: for<'a> FromPyObject<'a, 'py>,
{
    value.map(|value| number(argument, value)).transpose()
}

/// Packed hashes.
pub(crate) fn hashes(packed: &[u8]) -> Result<Vec<BlockHash>> {
    let (whole, rest) = packed.as_chunks::<HASH_BYTES>();
    if !rest.is_empty() {
        let problem = format!(
            "is {} bytes; takes {HASH_BYTES} for each block",
            packed.len()
        );
        return Err(Failure::argument("hashes", problem));
    }
    Ok(whole.iter().map(|hash| BlockHash(*hash)).collect())
}

/// A borrower's id.
pub(crate) fn borrower(argument: impl Into<String>, id: &[u8]) -> Result<BorrowerId> {
    id.try_into().map(BorrowerId).map_err(|_| {
        let problem = format!("is {} bytes; takes 16", id.len());
        Failure::argument(argument, problem)
    })
}

/// Hashes, and the pool's block for each.
pub(crate) fn sequence(
    packed: &[u8],
    blocks: &Bound<'_, PyAny>,
) -> PyResult<(Vec<BlockHash>, Vec<u32>)> {
    let hashes = hashes(packed)?;
    let blocks: Vec<u32> = number("blocks", blocks)?;
    if blocks.len() != hashes.len() {
        let problem = format!("has {} entries for {} hashes", blocks.len(), hashes.len());
        return Err(Failure::argument("blocks", problem).into());
    }
    Ok((hashes, blocks))
}

/// Text that names something, or says that nothing is named.
pub(crate) fn named<T>(argument: &str, text: Option<&str>) -> Result<Option<T>>
where
    T: FromStr<Err = String>,
{
    let text = text.filter(|text| !text.is_empty());
    let named = text.map(str::parse).transpose();
    named.map_err(|problem| Failure::argument(argument, problem))
}

/// How long to wait.
pub(crate) fn seconds(seconds: f64) -> Result<Duration> {
    duration("seconds", seconds)
}

/// So many seconds, by the argument's name.
pub(crate) fn duration(argument: &str, seconds: f64) -> Result<Duration> {
    // `min` would take the longest for what is not a number.
    let seconds = match seconds > LONGEST_SECONDS {
        true => LONGEST_SECONDS,
        false => seconds,
    };
    Duration::try_from_secs_f64(seconds).map_err(|error| Failure::argument(argument, error))
}

/// How long to wait.
pub(crate) fn milliseconds(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds).min(Duration::from_secs(LONGEST_SECONDS as u64))
}
