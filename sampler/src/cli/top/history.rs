//! The last minute of one row or GPU: what sparklines and rates are made of.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// How far back lines and rates reach.
pub const SPAN: Duration = Duration::from_secs(60);
/// Less says nothing of a rate.
const LEAST: Duration = Duration::from_secs(2);
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[derive(Clone, Debug, Default)]
pub struct Point {
    /// Since the Unix epoch, by the agent's clock.
    pub at: Duration,
    /// 0 to 1.
    pub value: Option<f64>,
    /// Seconds that others kept it waiting so far: in all, and by whom.
    pub waited: f64,
    pub waited_for: HashMap<String, f64>,
}

/// Bounded by [`SPAN`] and the least interval of asking.
#[derive(Clone, Debug, Default)]
pub struct History(VecDeque<Point>);

impl History {
    pub fn push(&mut self, point: Point) {
        // A counter that fell is another life, a clock that was set back another time.
        if self.0.back().is_some_and(|last| last.at > point.at || last.waited > point.waited) {
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

    /// What a counter gained per second, once it was seen for long enough.
    pub fn rate(&self, of: impl Fn(&Point) -> f64) -> Option<f64> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        let span = last.at.saturating_sub(first.at);
        (span >= LEAST).then(|| (of(last) - of(first)).max(0.0) / span.as_secs_f64())
    }

    /// The last minute in `width` characters, the present to the right; a blank where nothing is known.
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

    fn point(second: u64, value: f64, waited: f64) -> Point {
        Point { at: Duration::from_secs(second), value: Some(value), waited, waited_for: HashMap::new() }
    }

    #[test]
    fn a_minute_in_characters() {
        let mut history = History::default();
        assert_eq!(history.spark(Duration::from_secs(100), 4), "    ");
        for (second, value) in [(70, 0.0), (86, 0.5), (100, 1.0)] {
            history.push(point(second, value, 0.0));
        }
        assert_eq!(history.spark(Duration::from_secs(100), 6), "  ▁ ▅█");
    }

    #[test]
    fn rates_are_of_one_life_and_of_the_last_minute() {
        let mut history = History::default();
        let mut rate = |second, waited| {
            history.push(point(second, 0.0, waited));
            history.rate(|point| point.waited)
        };
        assert_eq!((rate(10, 5.0), rate(11, 5.5), rate(12, 6.0)), (None, None, Some(0.5)));
        assert_eq!(rate(100, 6.0), None);
        assert_eq!((rate(102, 7.0), rate(103, 0.0), rate(105, 1.0)), (Some(0.5), None, Some(0.5)));
    }
}
