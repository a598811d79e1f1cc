//! How numbers are compared: by their bits, or by the largest difference, which is always printed.

#[path = "../../../kernels/tests/oracle/largest.rs"]
mod largest;

pub(crate) use largest::Largest;

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// max|got - want| / max|want| of one tensor; a tensor of zeros must be met exactly.
pub(crate) fn distance(got: &[f32], want: &[f64]) -> f64 {
    largest::distance(&widen(got), want)
}
