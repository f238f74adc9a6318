//! Merges windows into bins, so that a timeline of any length fits a drawing.

use super::model::{Lane, Timeline};

/// The shares of a lane; `None` where the GPU was not observed. A share credited in a window that was mostly unobserved is known.
pub fn known_shares(timeline: &Timeline, lane: &Lane) -> Vec<Option<f32>> {
    let is_observed = |at: usize| timeline.busy.get(at).copied().flatten().is_some();
    lane.shares.iter().enumerate().map(|(at, share)| (*share > 0.0 || is_observed(at)).then_some(*share)).collect()
}

/// The mean of each of `bins` equal parts; `None` where less than half of the part is known. Never more bins than values.
pub fn means(values: &[Option<f32>], bins: usize) -> Vec<Option<f32>> {
    equal_parts(values.len(), bins)
        .map(|part| {
            let part = values.get(part).unwrap_or_default();
            let known: Vec<f32> = part.iter().copied().flatten().collect();
            (known.len() * 2 >= part.len() && !known.is_empty()).then(|| known.iter().sum::<f32>() / known.len() as f32)
        })
        .collect()
}

/// The maximum of each of `bins` equal parts, for memory, of which the peak matters.
pub fn peaks(values: &[Option<u64>], bins: usize) -> Vec<Option<u64>> {
    equal_parts(values.len(), bins).map(|part| values.get(part).unwrap_or_default().iter().copied().flatten().max()).collect()
}

fn equal_parts(n: usize, bins: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let bins = bins.min(n);
    (0..bins).map(move |bin| bin * n / bins..(bin + 1) * n / bins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_of_mostly_unknown_parts_are_unknown() {
        let values = [Some(1.0), Some(0.0), None, None, Some(0.5), None, Some(1.0)];
        assert_eq!(means(&values, 100), values);
        assert_eq!(means(&values[..6], 3), [Some(0.5), None, Some(0.5)]);
        assert_eq!(means(&[], 5), []);
        assert_eq!(peaks(&[Some(3), None, Some(9), None], 2), [Some(3), Some(9)]);
    }

    #[test]
    fn a_lane_is_unknown_where_its_gpu_is() {
        let timeline = Timeline { busy: vec![Some(0.5), None, None], ..Timeline::default() };
        let lane = Lane { shares: vec![0.0, 0.0, 0.25], ..Lane::default() };
        assert_eq!(known_shares(&timeline, &lane), [Some(0.0), None, Some(0.25)]);
    }
}
