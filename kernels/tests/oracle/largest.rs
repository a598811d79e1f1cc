//! How results are compared: by the largest difference, which is always printed. The tests of `model` use it too.

/// max|got - want| / max|want| of one tensor; a tensor of zeros must be met exactly.
pub(crate) fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-300f64, |scale, x| scale.max(x.abs()));
    // `max` alone would pass over a NaN.
    let difference = |(a, b): (&f64, &f64)| match (a - b).abs() {
        difference if difference.is_nan() => f64::INFINITY,
        difference => difference,
    };
    got.iter().zip(want).map(difference).fold(0.0f64, f64::max) / scale
}

/// The largest difference met so far and where: printed by every test that compares numbers.
#[derive(Debug, Default)]
pub(crate) struct Largest {
    difference: f64,
    place: String,
    pub(crate) compared: usize,
}

impl Largest {
    /// Notes one comparison; panics where it is above the limit or not a number.
    pub(crate) fn note(&mut self, difference: f64, limit: f64, place: impl Fn() -> String) {
        self.compared += 1;
        assert!(difference <= limit, "{}: {difference:.3e} is above {limit:e}", place());
        if difference > self.difference {
            (self.difference, self.place) = (difference, place());
        }
    }

    /// Prints what was noted; panics if that is nothing.
    pub(crate) fn print(&self, what: &str) {
        assert!(self.compared > 0, "{what}: nothing was compared");
        println!(
            "{what}: {} comparisons, largest relative difference {:.2e} at {}",
            self.compared, self.difference, self.place
        );
    }
}
