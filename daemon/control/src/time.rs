//! Calendar time in JSON: RFC 3339 in UTC with nanoseconds, as in `2026-07-01T12:00:00.000000000Z`.
//!
//! The digits are always written in full, so that a time copied from one answer names the same instant in the next
//! request. The calendar arithmetic is the civil-days algorithm of Howard Hinnant ("chrono-compatible low-level
//! date algorithms"), for years from 1970 on.

use std::fmt;
use std::str::FromStr;

use block::WallTime;
use serde::{Deserialize, Serialize};

const NANOSECONDS: u64 = 1_000_000_000;
const DAY_SECONDS: u64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: u64 = 719_468;
/// Days of 400 years.
const ERA_DAYS: u64 = 146_097;

/// An instant of a site's calendar clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(pub WallTime);

/// Why a time was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("time '{0}' is not understood: write it in UTC as in 2026-07-01T12:00:00Z")]
pub struct TimestampError(String);

impl fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.seconds();
        let days = seconds / DAY_SECONDS + EPOCH_DAYS;
        let era_day = days % ERA_DAYS;
        let era_year = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
        let year_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
        // Months count from March, so that the leap day is a year's last.
        let month_from_march = (5 * year_day + 2) / 153;
        let day = year_day - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = days / ERA_DAYS * 400 + era_year + u64::from(month <= 2);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let nanosecond = self.0.0 % NANOSECONDS;
        write!(formatter, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanosecond:09}Z")
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text)
            .map(|nanoseconds| Self(WallTime(nanoseconds)))
            .ok_or_else(|| TimestampError(text.chars().take(64).collect()))
    }
}

/// Nanoseconds since the Unix epoch, if the text is a time of the form above; the fraction may be shorter.
fn parse(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    let fraction_good =
        (1..=9).contains(&fraction.len()) && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let in_range = year >= 1970 && (1..=12).contains(&month) && hour < 24 && minute < 60 && second < 60;
    if !fraction_good || !in_range || day == 0 || day > month_days(year, month) {
        return None;
    }
    let nanosecond: u64 = format!("{fraction:0<9}").parse().ok()?;
    let march_year = year - u64::from(month <= 2);
    let era_year = march_year % 400;
    let month_from_march = (month + 9) % 12;
    let year_day = (153 * month_from_march + 2) / 5 + day - 1;
    let era_day = era_year * 365 + era_year / 4 - era_year / 100 + year_day;
    let days = march_year / 400 * ERA_DAYS + era_day - EPOCH_DAYS;
    let seconds = days * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    seconds.checked_mul(NANOSECONDS)?.checked_add(nanosecond)
}

/// Three numbers with exactly these digits each.
fn numbers(text: &str, separator: char, digits: [usize; 3]) -> Option<[u64; 3]> {
    let mut parts = text.split(separator);
    let mut numbers = [0; 3];
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part = parts.next()?;
        let good = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
        *number = good.then(|| part.parse().ok()).flatten()?;
    }
    parts.next().is_none().then_some(numbers)
}

const fn month_days(year: u64, month: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl TryFrom<String> for Timestamp {
    type Error = TimestampError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Timestamp> for String {
    fn from(time: Timestamp) -> Self {
        time.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_instants_are_written_as_the_calendar_says() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000000Z"),
            (1_709_164_799, "2024-02-28T23:59:59.000000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000000000Z"),
        ] {
            assert_eq!(Timestamp(WallTime(seconds * NANOSECONDS)).to_string(), text);
        }
        assert_eq!("1970-01-01T00:00:01.5Z".parse(), Ok(Timestamp(WallTime(1_500_000_000))));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2026-07-01",
            "2026-07-01T12:00:00",
            "2026-02-29T12:00:00Z",
            "2100-02-29T12:00:00Z",
            "2026-13-01T12:00:00Z",
            "2026-00-01T12:00:00Z",
            "2026-07-01T24:00:00Z",
            "+026-07-01T12:00:00Z",
            "2026-07-01T12:00:00.Z",
            "9999-07-01T12:00:00Z",
            "1969-12-31T23:59:59Z",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_instant_is_read_as_it_was_written(nanoseconds: u64) {
            let time = Timestamp(WallTime(nanoseconds));
            prop_assert_eq!(time.to_string().parse(), Ok(time));
        }
    }
}
