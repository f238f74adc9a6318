//! Values of the command line.

use std::time::Duration;

use nvidia_ml_sim::faults::micros;
use nvidia_ml_sim::{loads, time};

pub fn demand(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|d| *d > 0.0 && *d <= 1.0).ok_or_else(|| "a demand must be above 0 and at most 1".into())
}

/// A schedule of demands, as on the command line.
#[derive(Clone, Debug)]
pub struct Steps(pub Vec<loads::Step>);

pub fn steps(text: &str) -> Result<Steps, String> {
    let wrong = || "expected demands from 0 to 1 with their durations, such as 1.0:20s,0:10s; the last may have none".to_owned();
    let step = |text: &str| {
        let (demand, lasts) = text.split_once(':').map_or((text, None), |(demand, lasts)| (demand, Some(lasts)));
        let demand = demand.parse().ok().filter(|d| (0.0..=1.0).contains(d)).ok_or_else(wrong)?;
        let lasts_us = lasts.map(|lasts| time::span(lasts).map(micros)).transpose()?;
        if lasts_us == Some(0) { Err(wrong()) } else { Ok(loads::Step { demand, lasts_us }) }
    };
    let steps = text.split(',').map(step).collect::<Result<Vec<_>, String>>()?;
    let open = steps.iter().rev().skip(1).any(|step| step.lasts_us.is_none());
    let idle = steps.iter().all(|step| step.demand == 0.0);
    if open || idle { Err(wrong()) } else { Ok(Steps(steps)) }
}

pub fn bytes(text: &str) -> Result<u64, String> {
    let shift = match time::number(text).1 {
        "" => Some(0),
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        _ => None,
    };
    let bytes = time::number(text).0.zip(shift).map(|(n, shift)| n * f64::from(1u32 << shift));
    bytes.map(|b| b as u64).ok_or_else(|| "expected bytes, or a number with KiB, MiB or GiB".into())
}

/// One demand, or a range from which it is drawn: 0.01..0.4
pub fn demands(text: &str) -> Result<(f64, f64), String> {
    let (from, to) = text.split_once("..").unwrap_or((text, text));
    let (from, to) = (demand(from)?, demand(to)?);
    if from > to { Err("expected smaller..larger, such as 0.01..0.4".into()) } else { Ok((from, to)) }
}

pub fn durations(text: &str) -> Result<(Duration, Duration), String> {
    let (from, to) = text.split_once("..").ok_or("expected two durations such as 5ms..50ms")?;
    let (from, to) = (time::span(from)?, time::span(to)?);
    if from > to { Err("expected shorter..longer, such as 5ms..50ms".into()) } else { Ok((from, to)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_ranges_and_schedules_are_parsed() {
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("1.5MiB"), Ok(3 << 19));
        assert_eq!(bytes("17"), Ok(17));
        assert!(bytes("2GB").is_err() && bytes("").is_err());
        assert_eq!(time::span("500ms"), Ok(Duration::from_millis(500)));
        assert!(time::span("5").is_err());
        let ms = Duration::from_millis;
        assert_eq!(durations("5ms..50ms"), Ok((ms(5), ms(50))));
        assert_eq!(durations("0.5s..0.5s"), Ok((ms(500), ms(500))));
        for wrong in ["", "5ms", "..", "5ms..", "..5ms", "5..50ms", "5ms...50ms", "5ms..50ms..60ms"] {
            assert!(durations(wrong).is_err(), "{wrong}");
        }
        assert!(durations("50ms..5ms").is_err_and(|e| e.contains("shorter..longer")));
        assert!(demand("0").is_err() && demand("1.1").is_err() && demand("x").is_err());
        let parsed = |text| steps(text).map(|s| s.0.iter().map(|s| (s.demand, s.lasts_us)).collect::<Vec<_>>());
        assert_eq!(parsed("1.0:20s,0:500ms"), Ok(vec![(1.0, Some(20_000_000)), (0.0, Some(500_000))]));
        assert_eq!(parsed("0.5:1s,0"), Ok(vec![(0.5, Some(1_000_000)), (0.0, None)]));
        for wrong in ["", "1,0:1s", "0", "0:1s", "1.1:1s", "-1:1s", "1:0s", "1:5", "1:1s,", "x:1s"] {
            assert!(steps(wrong).is_err(), "{wrong}");
        }
        assert_eq!(demand("0.6"), Ok(0.6));
        assert_eq!((demands("0.6"), demands("0.01..0.4")), (Ok((0.6, 0.6)), Ok((0.01, 0.4))));
        assert!(demands("0.4..0.1").is_err() && demands("0..0.1").is_err() && demands("0.1..").is_err());
    }
}
