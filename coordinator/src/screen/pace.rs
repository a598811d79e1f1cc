//! How fast a run is, over the last seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Marks lie this far apart; the oldest of them begins the interval that is measured.
const MARK_INTERVAL: Duration = Duration::from_secs(1);

const MARKS: usize = 10;

/// Rows over time, evaluations and all other waiting included.
#[derive(Debug)]
pub(super) struct Pace {
    /// Moments, and rows until then.
    marks: VecDeque<(Instant, u64)>,
    rows: u64,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { marks: VecDeque::from([(now, 0)]), rows: 0 }
    }

    /// Counts rows that are done by `now`.
    pub(super) fn add(&mut self, now: Instant, rows: u64) {
        self.rows += rows;
        if self.marks.back().is_some_and(|(mark, _)| now - *mark >= MARK_INTERVAL) {
            self.marks.push_back((now, self.rows));
            // The newest is `now` itself: as many again lie before it.
            if self.marks.len() > MARKS + 1 {
                self.marks.pop_front();
            }
        }
    }

    /// Rows per second; none before there is anything to measure.
    pub(super) fn samples_per_second(&self, now: Instant) -> Option<f64> {
        let (since, before) = *self.marks.front()?;
        let seconds = (now - since).as_secs_f64();
        (seconds > 0.0 && self.rows > before).then(|| (self.rows - before) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut pace = Pace::new(start);
        assert_eq!(pace.samples_per_second(after(0.5)), None);
        pace.add(after(0.5), 50);
        assert_eq!(pace.samples_per_second(after(0.5)), Some(100.0));
        // Twice as fast from then on: after a while nothing of the beginning is left.
        for tick in 6..300 {
            pace.add(after(f64::from(tick) / 10.0), 20);
        }
        let pace = pace.samples_per_second(after(29.9)).unwrap();
        assert!((pace - 200.0).abs() < 5.0, "{pace}");
    }
}
