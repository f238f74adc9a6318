//! The last minute of one row: the values of its sparkline and its rates.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// The span of sparklines and rates.
pub const SPAN: Duration = Duration::from_secs(60);
/// A rate is computed from no shorter span.
const LEAST_SPAN: Duration = Duration::from_secs(2);
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[derive(Clone, Debug, Default)]
pub struct Point {
    /// Since the Unix epoch, by the agent's clock.
    pub at: Duration,
    /// Share of the GPU, 0 to 1.
    pub value: Option<f64>,
    /// Contention seconds so far.
    pub contention: f64,
    /// Contention seconds so far, by contender.
    pub contention_with: HashMap<String, f64>,
}

/// Bounded by [`SPAN`] and the least poll interval.
#[derive(Clone, Debug, Default)]
pub struct History(VecDeque<Point>);

impl History {
    pub fn push(&mut self, point: Point) {
        // A counter that fell was reset, and a clock that was set back makes the older points useless.
        if self.0.back().is_some_and(|last| last.at > point.at || last.contention > point.contention) {
            self.0.clear();
        }
        if self.0.back().is_some_and(|last| last.at == point.at) {
            return;
        }
        let oldest = point.at.saturating_sub(SPAN);
        self.0.push_back(point);
        while self.0.front().is_some_and(|first| first.at < oldest) {
            self.0.pop_front();
        }
    }

    pub fn is_older_than(&self, at: Duration) -> bool {
        self.0.back().is_none_or(|last| last.at < at)
    }

    /// The increase of a counter per second; `None` until the points span [`LEAST_SPAN`].
    pub fn rate(&self, counter: impl Fn(&Point) -> f64) -> Option<f64> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        let span = last.at.saturating_sub(first.at);
        (span >= LEAST_SPAN).then(|| (counter(last) - counter(first)).max(0.0) / span.as_secs_f64())
    }

    /// The last minute in `width` characters, newest to the right; a space where the value is unknown.
    pub fn spark(&self, now: Duration, width: usize) -> String {
        let mut columns: Vec<Option<f64>> = vec![None; width];
        for point in &self.0 {
            let ago = now.saturating_sub(point.at).as_secs_f64() / SPAN.as_secs_f64();
            let column = width.checked_sub(1 + (ago * width as f64) as usize);
            if let (Some(slot), Some(value)) = (column.and_then(|n| columns.get_mut(n)), point.value) {
                *slot = Some(slot.unwrap_or_default().max(value));
            }
        }
        let level = |value: f64| LEVELS[((value.clamp(0.0, 1.0) * LEVELS.len() as f64) as usize).min(LEVELS.len() - 1)];
        columns.into_iter().map(|value| value.map_or(' ', level)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(second: u64, value: f64, contention: f64) -> Point {
        Point { at: Duration::from_secs(second), value: Some(value), contention, contention_with: HashMap::new() }
    }

    #[test]
    fn a_sparkline_shows_the_last_minute() {
        let mut history = History::default();
        assert_eq!(history.spark(Duration::from_secs(100), 4), "    ");
        for (second, value) in [(70, 0.0), (86, 0.5), (100, 1.0)] {
            history.push(point(second, value, 0.0));
        }
        assert_eq!(history.spark(Duration::from_secs(100), 6), "  ▁ ▅█");
    }

    #[test]
    fn rates_cover_the_last_minute_and_begin_again_after_a_reset() {
        let mut history = History::default();
        let mut rate = |second, contention| {
            history.push(point(second, 0.0, contention));
            history.rate(|point| point.contention)
        };
        assert_eq!((rate(10, 5.0), rate(11, 5.5), rate(12, 6.0)), (None, None, Some(0.5)));
        assert_eq!(rate(100, 6.0), None);
        assert_eq!((rate(102, 7.0), rate(103, 0.0), rate(105, 1.0)), (Some(0.5), None, Some(0.5)));
    }
}
