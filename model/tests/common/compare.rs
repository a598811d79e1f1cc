//! How numbers are compared: by their bits, or by the largest difference, which is always printed.

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// max|got - want| / max|want| of one tensor; a tensor of zeros must be met exactly.
pub(crate) fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-30f64, |scale, x| scale.max(x.abs()));
    // `max` alone would pass over a NaN.
    let difference = |(&a, &b): (&f32, &f64)| match (f64::from(a) - b).abs() {
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
    compared: usize,
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
            "{what}: {} comparisons, largest difference {:.2e} at {}",
            self.compared, self.difference, self.place
        );
    }
}
