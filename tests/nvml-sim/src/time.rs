//! RFC 3339 in UTC, to the microsecond; and durations such as 5s.

use std::time::Duration;

use anyhow::{Context as _, bail};

const DAY_US: u64 = 86_400_000_000;

/// Days since the epoch of a date in the proleptic Gregorian calendar, counted in years that begin in March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year.div_euclid(400) * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

pub fn format(us: u64) -> String {
    let (day, rest) = ((us / DAY_US) as i64, us % DAY_US);
    // The estimate is never late and at most a year early.
    let mut year = 1970 + day / 366;
    while days(year + 1, 1, 1) <= day {
        year += 1;
    }
    let month = (1..=12).rev().find(|m| days(year, *m, 1) <= day).unwrap_or(1);
    let date = day - days(year, month, 1) + 1;
    let (s, us) = (rest / 1_000_000, rest % 1_000_000);
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}.{us:06}Z", s / 3600, s / 60 % 60, s % 60)
}

pub fn parse(text: &str) -> anyhow::Result<u64> {
    let wrong = || format!("{text:?} is not an RFC 3339 time such as 2026-01-31T12:00:00Z or 2026-01-31T13:00:00.5+01:00");
    let (date, clock) = text.split_once(['T', 't', ' ']).with_context(wrong)?;
    let (clock, offset_s) = match clock.find(['Z', 'z', '+', '-']) {
        Some(at) if clock[at..].eq_ignore_ascii_case("z") => (&clock[..at], 0),
        Some(at) => {
            let (hours, minutes) = clock[at + 1..].split_once(':').with_context(wrong)?;
            let seconds = hours.parse::<i64>().with_context(wrong)? * 3600 + minutes.parse::<i64>().with_context(wrong)? * 60;
            (&clock[..at], if clock[at..].starts_with('-') { -seconds } else { seconds })
        }
        None => bail!(wrong()),
    };
    let number = |text: &str| text.parse::<i64>().ok().filter(|n| *n >= 0);
    let date: Vec<i64> = date.split('-').filter_map(number).collect();
    let (whole, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let clock: Vec<i64> = whole.split(':').filter_map(number).collect();
    let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let us = digits.parse::<i64>().with_context(wrong)?;
    match (&date[..], &clock[..]) {
        ([year, month @ 1..=12, day @ 1..=31], [hour @ 0..=23, minute @ 0..=59, second @ 0..=60]) => {
            let seconds = days(*year, *month, *day) * 86_400 + hour * 3600 + minute * 60 + second - offset_s;
            u64::try_from(seconds * 1_000_000 + us).ok().with_context(wrong)
        }
        _ => bail!(wrong()),
    }
}

/// The number at the begin of the text, and the rest.
pub fn number(text: &str) -> (Option<f64>, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (text[..end].parse().ok(), &text[end..])
}

/// A duration such as 5s, 500ms or 1m.
pub fn span(text: &str) -> Result<Duration, String> {
    let factor = match number(text).1 {
        "s" => Some(1.0),
        "ms" => Some(0.001),
        "us" => Some(0.000_001),
        "m" => Some(60.0),
        _ => None,
    };
    let seconds = number(text).0.zip(factor).map(|(n, factor)| n * factor);
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).ok_or_else(|| "expected a duration such as 5s, 500ms or 1m".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_3339_times_round_trip_and_invalid_ones_are_rejected() {
        for (text, us) in [
            ("1970-01-01T00:00:00.000000Z", 0),
            ("2000-02-29T23:59:59.999999Z", 951_868_799_999_999),
            ("2026-11-24T15:00:00.500000Z", 1_795_532_400_500_000),
            ("2100-03-01T00:00:00.000000Z", 4_107_542_400_000_000),
        ] {
            assert_eq!(format(us), text);
            assert_eq!(parse(text).unwrap(), us);
        }
        assert_eq!(parse("2026-11-24T16:00:00.5+01:00").unwrap(), 1_795_532_400_500_000);
        for wrong in ["", "now", "2026-13-01T00:00:00Z", "2026-01-01", "2026-01-01T00:00:00"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for day in (0..60_000).step_by(13) {
            assert_eq!(parse(&format(day * DAY_US)).unwrap(), day * DAY_US);
        }
    }
}
