//! Numbers to compute with.

/// Numbers in [-scale, scale), different for each salt.
pub(crate) fn numbers(len: usize, scale: f64, salt: u64) -> Vec<f64> {
    (0..len as u64)
        .map(|at| {
            let bits = protocol::random::mix64(at ^ (salt << 32));
            scale * ((bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        })
        .collect()
}
