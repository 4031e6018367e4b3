//! Time stamps, and what is refused because it looks like another unit.

/// How a trace says when a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stamps {
    /// It does not.
    None,
    Milliseconds,
    Microseconds,
    Seconds,
    /// `YYYY-MM-DD hh:mm:ss`, with or without a fraction and a zone.
    Wall,
}

/// Seconds from 1970 to 2001: whatever begins later is the time of day, and what begins before counts from its own zero.
const EPOCH_S: f64 = 1e9;

impl Stamps {
    /// What it takes, for an error message.
    pub(crate) fn takes(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Milliseconds => "milliseconds from 0",
            Self::Microseconds => "microseconds from 0",
            Self::Seconds => "seconds from 0",
            Self::Wall => "YYYY-MM-DD hh:mm:ss, with or without a fraction and a zone (Z, +hh:mm)",
        }
    }

    /// A number in seconds.
    pub(crate) fn seconds(self, number: f64) -> f64 {
        match self {
            Self::Milliseconds => number / 1e3,
            Self::Microseconds => number / 1e6,
            _ => number,
        }
    }

    /// The stamp of a table's cell, in seconds.
    pub(crate) fn read(self, text: &str) -> Option<f64> {
        match self {
            Self::Wall => wall_s(text),
            _ => {
                let number = text.parse().ok();
                let number = number.filter(|number: &f64| (0.0..=1e18).contains(number));
                number.map(|number| self.seconds(number))
            }
        }
    }

    /// What to take off every stamp of a trace that begins at `first_s`: nothing where it counts from a zero of its own.
    pub(crate) fn zero_s(self, first_s: f64) -> Result<f64, String> {
        // Ten digits of seconds read as milliseconds are days 11 to 115 after 1970, and so on.
        let looks_like = |unit: &str| {
            Err(format!(
                "timestamp: begins with a number that looks like {unit} since 1970; takes {}",
                self.takes()
            ))
        };
        let years = EPOCH_S..10.0 * EPOCH_S;
        match self {
            Self::Wall => Ok(first_s),
            Self::None => Ok(0.0),
            _ if years.contains(&first_s) => Ok(first_s),
            Self::Milliseconds if years.contains(&(first_s * 1e3)) => looks_like("seconds"),
            Self::Microseconds if years.contains(&(first_s * 1e6)) => looks_like("seconds"),
            Self::Microseconds if years.contains(&(first_s * 1e3)) => looks_like("milliseconds"),
            Self::Seconds if years.contains(&(first_s / 1e3)) => looks_like("milliseconds"),
            Self::Milliseconds if years.contains(&(first_s / 1e3)) => looks_like("microseconds"),
            Self::Seconds if years.contains(&(first_s / 1e6)) => looks_like("microseconds"),
            _ if first_s >= EPOCH_S => Err(format!(
                "timestamp: begins {:.0} days after its zero; takes {}",
                first_s / 86_400.0,
                self.takes()
            )),
            _ => Ok(0.0),
        }
    }
}

/// Seconds since 1970 of `YYYY-MM-DD hh:mm:ss[.fraction][zone]`; without a zone it is taken for UTC.
fn wall_s(stamp: &str) -> Option<f64> {
    let (date, time) = stamp.split_once([' ', 'T'])?;
    let mut date = date.split('-');
    let year = whole(date.next()?, 1970..=2200)?;
    let month = whole(date.next()?, 1..=12)?;
    let day = whole(date.next()?, 1..=days_of(year, month))?;
    if date.next().is_some() {
        return None;
    }
    let (time, zone_s) = match time.find(['Z', '+', '-']) {
        Some(at) => (time[..at].trim_end(), zone_s(&time[at..])?),
        None => (time, 0.0),
    };
    let mut clock = time.split(':');
    let hour = whole(clock.next()?, 0..=23)?;
    let minute = whole(clock.next()?, 0..=59)?;
    let second = clock.next()?;
    if clock.next().is_some() {
        return None;
    }
    let (second, fraction) = second.split_once('.').unwrap_or((second, "0"));
    let second = whole(second, 0..=60)?;
    let digits = !fraction.is_empty() && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let fraction: f64 = format!("0.{fraction}").parse().ok().filter(|_| digits)?;
    let seconds = (hour * 60 + minute) * 60 + second;
    let days = f64::from(days_since_1970(year, month, day));
    Some(days * 86_400.0 + f64::from(seconds) + fraction - zone_s)
}

/// How far a zone is ahead of UTC, seconds: `Z`, `+hh`, `+hhmm` or `+hh:mm`.
fn zone_s(zone: &str) -> Option<f64> {
    if zone == "Z" {
        return Some(0.0);
    }
    let sign = match zone.as_bytes().first()? {
        b'+' => 1.0,
        _ => -1.0,
    };
    let digits: String = match zone[1..].split_once(':') {
        Some((hours, minutes)) if hours.len() == 2 => [hours, minutes].concat(),
        Some(_) => return None,
        None => zone[1..].to_owned(),
    };
    let (hours, minutes) = match digits.len() {
        2 => (digits.as_str(), "00"),
        4 if digits.is_ascii() => digits.split_at(2),
        _ => return None,
    };
    let minutes = whole(hours, 0..=18)? * 60 + whole(minutes, 0..=59)?;
    Some(sign * f64::from(minutes * 60))
}

fn whole(text: &str, range: std::ops::RangeInclusive<u32>) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| digits)?;
    range.contains(&number).then_some(number)
}

fn days_of(year: u32, month: u32) -> u32 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days of the Gregorian calendar since 1 January 1970. A year begins in March here, so that the leap day is its
/// last day.
fn days_since_1970(year: u32, month: u32, day: u32) -> u32 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stamp_is_the_same_moment_however_it_is_written() {
        let moment = wall_s("2024-05-10 00:00:37").unwrap();
        for same in [
            "2024-05-10 00:00:37+00:00",
            "2024-05-10T00:00:37Z",
            "2024-05-10 00:00:37.000000+00:00",
            "2024-05-10 02:00:37+02:00",
            "2024-05-09 18:30:37-0530",
            "2024-05-10 01:00:37+01",
        ] {
            assert_eq!(wall_s(same), Some(moment), "{same}");
        }
        assert_eq!(wall_s("2024-05-10 00:00:37.25+00:00"), Some(moment + 0.25));
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2023, 11, 16), 19_677);
        assert_eq!(wall_s("1970-01-02 00:00:00"), Some(86_400.0));
    }

    #[test]
    fn what_is_no_moment_is_refused_rather_than_read_as_another() {
        for wrong in [
            "2024-05-10 00:00:37+",
            "2024-05-10 00:00:37+0",
            "2024-05-10 00:00:37+99:00",
            "2024-05-10 00:00:37+0:00",
            "2024-05-10 00:00:37 UTC",
            "2024-05-10 00:00:37.",
            "2024-05-10 00:00",
            "2024-05-10 00:00:00:00",
            "2024-05-10 24:00:00",
            "2023-02-29 00:00:00",
            "2024-04-31 00:00:00",
            "2024-13-01 00:00:00",
            "10.05.2024 00:00:00",
            "yesterday",
            "",
        ] {
            assert_eq!(wall_s(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn seconds_since_1970_are_not_read_as_milliseconds() {
        // Nine moments of 2023, each in another unit, and what each column takes.
        let stamps = [1.7e9, 1.7e12, 1.7e15];
        let takes = [Stamps::Seconds, Stamps::Milliseconds, Stamps::Microseconds];
        for (unit, stamp) in stamps.iter().enumerate() {
            for (column, kind) in takes.iter().enumerate() {
                let zero = kind.zero_s(kind.seconds(*stamp));
                match unit == column {
                    true => assert_eq!(zero, Ok(1.7e9)),
                    false => assert!(zero.unwrap_err().contains("since 1970"), "{stamp} {kind:?}"),
                }
            }
        }
        for kind in takes {
            assert_eq!(
                kind.zero_s(kind.seconds(27.0)),
                Ok(0.0),
                "a zero of its own"
            );
        }
    }

    proptest! {
        #[test]
        fn no_stamp_makes_it_panic(stamp in "[0-9]{1,5}-[0-9]{1,3}-[0-9]{1,3}[ T][0-9:.]{0,20}[Z+-]{0,2}[0-9:]{0,6}") {
            if let Some(seconds) = wall_s(&stamp) {
                prop_assert!((-1e5..8e9).contains(&seconds));
            }
        }

        #[test]
        fn no_text_makes_it_panic(stamp in any::<String>()) {
            let _ = wall_s(&stamp);
        }
    }
}
