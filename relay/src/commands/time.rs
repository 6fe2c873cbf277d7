//! Times and durations as people write and read them.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};

use crate::cli::Refused;

const NOT_A_SPAN: Refused = Refused("a duration is numbers with units, such as 30s, 2h, \"3 days\" or 1h30m");
const NOT_A_MOMENT: Refused =
    Refused("a time is RFC 3339, such as 2026-01-31T12:00:00Z, or a duration back, such as 2h or \"3 days\"");

/// A moment: RFC 3339, or a duration before now.
pub fn moment(text: &str) -> Result<SystemTime, Refused> {
    if let Ok(moment) = DateTime::parse_from_rfc3339(text.trim()) {
        return Ok(moment.into());
    }
    let back = span(text).map_err(|_| NOT_A_MOMENT)?;
    SystemTime::now().checked_sub(back).ok_or(NOT_A_MOMENT)
}

/// A duration: numbers with units, added up. A zero needs no unit.
pub fn span(text: &str) -> Result<Duration, Refused> {
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = split(&mut rest, |c| c.is_ascii_digit() || c == '.');
        rest = rest.trim_start();
        let unit = split(&mut rest, char::is_alphabetic);
        rest = rest.trim_start();
        seconds += number.parse::<f64>().map_err(|_| NOT_A_SPAN)? * seconds_of(unit).ok_or(NOT_A_SPAN)?;
    }
    match text.trim().is_empty() || seconds > LONGEST {
        true => Err(NOT_A_SPAN),
        false => Duration::try_from_secs_f64(seconds).map_err(|_| NOT_A_SPAN),
    }
}

/// A thousand years: more than anything is kept for.
const LONGEST: f64 = 1000.0 * 366.0 * 86_400.0;

/// Takes from the front what fits.
fn split<'a>(rest: &mut &'a str, fits: impl Fn(char) -> bool) -> &'a str {
    let end = rest.find(|c| !fits(c)).unwrap_or(rest.len());
    let (taken, left) = rest.split_at(end);
    *rest = left;
    taken
}

fn seconds_of(unit: &str) -> Option<f64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "ms" | "millisecond" | "milliseconds" => 0.001,
        "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86_400.0,
        "w" | "week" | "weeks" => 7.0 * 86_400.0,
        _ => return None,
    })
}

/// A duration in the two largest units that say something: `38 ms`, `4.2 s`, `3 min 5 s`, `2 h 5 min`, `3 d 4 h`.
pub fn shown(seconds: f64) -> String {
    if seconds < 1.0 {
        return format!("{:.0} ms", seconds.max(0.0) * 1000.0);
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let all = Duration::try_from_secs_f64(seconds.round()).map_or(u64::MAX, |span| span.as_secs());
    let (large, small) = match all {
        ..60 => return format!("{all} s"),
        60..3600 => ((all / 60, "min"), (all % 60, "s")),
        3600..86_400 => ((all / 3600, "h"), (all % 3600 / 60, "min")),
        _ => ((all / 86_400, "d"), (all % 86_400 / 3600, "h")),
    };
    match small.0 {
        0 => format!("{} {}", large.0, large.1),
        n => format!("{} {} {n} {}", large.0, large.1, small.1),
    }
}

/// How long ago a time is that PostgreSQL wrote into JSON; what is no time is shown as it is.
pub fn age(timestamp: &str) -> String {
    match DateTime::parse_from_rfc3339(timestamp) {
        Ok(moment) => {
            let since = DateTime::<Utc>::from(SystemTime::now()).signed_duration_since(moment);
            shown(since.as_seconds_f64())
        }
        Err(_) => timestamp.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [
            ("2h", 7200.0),
            ("3 days", 259_200.0),
            ("1h30m", 5400.0),
            ("1 h 30 min", 5400.0),
            (" 90 s ", 90.0),
            ("1.5 hours", 5400.0),
            ("250ms", 0.25),
            ("1 week", 604_800.0),
            ("0", 0.0),
            ("0s", 0.0),
        ] {
            assert_eq!(span(text).map(|span| span.as_secs_f64()), Ok(seconds), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", " ", "5", "h", "-2h", "2 fortnights", "1.2.3 s", "2h3", "1e9 d", "9999999999 weeks", "1 month"]
        {
            assert_eq!(span(text), Err(NOT_A_SPAN), "{text}");
        }
    }

    #[test]
    fn a_moment_is_rfc_3339_or_a_duration_back() {
        let at = |text: &str| moment(text).map(|at| DateTime::<Utc>::from(at).timestamp());
        assert_eq!(at("2026-01-31T12:00:00Z"), Ok(1_769_860_800));
        assert_eq!(at("2026-01-31T13:00:00+01:00"), Ok(1_769_860_800));
        let back = SystemTime::now().duration_since(moment("2h").unwrap()).unwrap();
        assert!((7190..7300).contains(&back.as_secs()), "{back:?}");
        for text in ["yesterday", "2026-01-31", "", "5", "999 years"] {
            assert_eq!(moment(text), Err(NOT_A_MOMENT), "{text}");
        }
    }

    #[test]
    fn durations_are_shown_in_two_units() {
        for (seconds, text) in [
            (-1.0, "0 ms"),
            (0.0384, "38 ms"),
            (0.4, "400 ms"),
            (4.24, "4.2 s"),
            (9.96, "10 s"),
            (59.7, "1 min"),
            (185.0, "3 min 5 s"),
            (7500.0, "2 h 5 min"),
            (273_600.0, "3 d 4 h"),
            (86_400.0, "1 d"),
        ] {
            assert_eq!(shown(seconds), text);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_duration_or_refused(text in "([0-9.]{0,30} ?[a-z]{0,3} ?){0,3}|.{0,20}") {
            prop_assert!(span(&text).is_ok_and(|span| span.as_secs_f64() <= LONGEST) || span(&text).is_err());
            let _moment = moment(&text);
        }

        #[test]
        fn any_number_of_seconds_is_shown(seconds in any::<f64>()) {
            prop_assert!(!shown(seconds).is_empty());
        }
    }
}
