//! How one tensor's numbers are drawn from its stream.

use std::f64::consts::TAU;

use protocol::random::Stream;

use super::orthogonal::orthonormalise;

/// A rule for the numbers of a tensor, in row-major order.
#[derive(Debug, Clone, Copy)]
pub(super) enum Draw {
    /// Uniform in ±`bound`.
    Uniform { bound: f64 },
    /// Normal around 0.
    Normal { deviation: f64 },
    /// Normal around 0, drawn again beyond two deviations.
    TruncatedNormal { deviation: f64 },
    /// Blocks `[rows, columns]`, one behind the other, with orthonormal columns (rows, where those are fewer) times
    /// `scale`.
    Orthogonal { rows: usize, columns: usize, scale: f64 },
}

impl Draw {
    /// Uniform within `√(numerator / denominator)`.
    pub(super) fn within_root(numerator: usize, denominator: usize) -> Self {
        Self::Uniform { bound: (numerator as f64 / denominator as f64).sqrt() }
    }

    /// Draws all of `values`.
    pub(super) fn fill(self, mut stream: Stream, values: &mut [f32]) {
        match self {
            Self::Uniform { bound } => {
                values.fill_with(|| (bound as f32) * (2.0 * stream.unit_f32() - 1.0));
            }
            Self::Normal { deviation } => {
                let mut normals = Normals::new(stream);
                values.fill_with(|| (deviation * normals.draw()) as f32);
            }
            Self::TruncatedNormal { deviation } => {
                let mut normals = Normals::new(stream);
                values.fill_with(|| (deviation * normals.draw_within(2.0)) as f32);
            }
            Self::Orthogonal { rows, columns, scale } => {
                let mut normals = Normals::new(stream);
                for block in values.chunks_exact_mut(rows * columns) {
                    let mut matrix: Vec<f64> = (0..block.len()).map(|_| normals.draw()).collect();
                    orthonormalise(&mut matrix, rows, columns);
                    for (value, entry) in block.iter_mut().zip(matrix) {
                        *value = (scale * entry) as f32;
                    }
                }
            }
        }
    }
}

/// Standard normal numbers by Box and Muller's method: two of them from two words. None is exactly 0.
struct Normals {
    stream: Stream,
    /// The second of a pair.
    spare: Option<f64>,
}

impl Normals {
    fn new(stream: Stream) -> Self {
        Self { stream, spare: None }
    }

    fn draw(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        // In (0, 1), never at an end: the logarithm is finite and neither it nor the sine is 0.
        let mut unit = || (f64::from(self.stream.next_u32()) + 0.5) / 4_294_967_296.0;
        let (radius, angle) = ((-2.0 * libm::log(unit())).sqrt(), TAU * unit());
        self.spare = Some(radius * libm::sin(angle));
        radius * libm::cos(angle)
    }

    fn draw_within(&mut self, limit: f64) -> f64 {
        loop {
            let normal = self.draw();
            if normal.abs() <= limit {
                return normal;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::random::Purpose;

    /// Mean, variance, skewness and kurtosis.
    fn moments(values: &[f64]) -> [f64; 4] {
        let mean_of =
            |f: &dyn Fn(f64) -> f64| values.iter().map(|&v| f(v)).sum::<f64>() / values.len() as f64;
        let mean = mean_of(&|v| v);
        let variance = mean_of(&|v| (v - mean).powi(2));
        [
            mean,
            variance,
            mean_of(&|v| (v - mean).powi(3)) / variance.powf(1.5),
            mean_of(&|v| (v - mean).powi(4)) / variance.powi(2),
        ]
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let mut normals = Normals::new(Stream::new(1, Purpose::Init, [0, 0]));
        let values: Vec<f64> = (0..100_000).map(|_| normals.draw()).collect();
        // Six standard errors: 6/√n, 6·√(2/n), 6·√(6/n), 6·√(24/n).
        let allowed = [0.019, 0.027, 0.047, 0.093];
        for ((got, expected), allowed) in moments(&values).into_iter().zip([0.0, 1.0, 0.0, 3.0]).zip(allowed)
        {
            assert!((got - expected).abs() < allowed, "{got}, expected {expected} ± {allowed}");
        }
        let beyond = values.iter().filter(|value| value.abs() > 2.0).count();
        assert!(beyond.abs_diff(4550) < 400, "{beyond} beyond two deviations");
    }

    #[test]
    fn truncated_normals_stay_within_two_deviations() {
        let mut values = vec![0.0; 100_000];
        let stream = Stream::new(1, Purpose::Init, [0, 0]);
        Draw::TruncatedNormal { deviation: 0.1 }.fill(stream, &mut values);
        let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        assert!(wide.iter().all(|v| v.abs() <= 0.200_000_01) && wide.iter().any(|v| v.abs() > 0.199));
        let [mean, variance, ..] = moments(&wide);
        // The variance of a standard normal cut off at two deviations is 0.7737.
        assert!(mean.abs() < 0.001_7 && (variance / 0.01 - 0.7737).abs() < 0.02, "{mean}, {variance}");
    }
}
