//! All that is random, from one seed.

use std::ops::Range;
use std::time::Duration;

use protocol::random::mix64;

/// A stream of numbers.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    /// The stream of this seed and these words.
    pub(super) fn new(seed: u64, words: &[u64]) -> Self {
        Self(words.iter().fold(mix64(seed), |state, &word| mix64(state ^ mix64(word.wrapping_add(0x9e37)))))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix64(self.0)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True once in `times`.
    pub(super) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A duration between these, in whole microseconds.
    pub(super) fn between(&mut self, range: Range<Duration>) -> Duration {
        let (from, to) = (range.start.as_micros() as u64, range.end.as_micros() as u64);
        Duration::from_micros(from + self.below(to - from))
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
