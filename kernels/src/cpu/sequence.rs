//! The shape that all sequence kernels share, and how they check their arguments against it.

/// A block of rows run through all steps by one call, on one thread.
///
/// Every sequence argument is laid out `[T][rows][width]`, so one step of the block is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceShape {
    /// Time steps, `T`.
    pub seq_len: usize,
    /// Rows of this block, a part of `B`.
    pub rows: usize,
    /// Hidden width, `H`.
    pub hidden_size: usize,
}

impl SequenceShape {
    /// Elements of `[rows][width · H]`.
    pub(crate) fn step(&self, width: usize) -> usize {
        self.rows * width * self.hidden_size
    }

    /// Asserts that an argument of `kernel` has the elements of `[steps][rows][width · H]`.
    pub(crate) fn check(&self, kernel: &str, name: &str, len: usize, steps: usize, width: usize) {
        let expected = steps * self.step(width);
        assert!(
            len == expected,
            "{kernel}: {name} has {len} elements, expected {expected} ({steps} steps · {} rows · {width} · \
             hidden_size {})",
            self.rows,
            self.hidden_size
        );
    }

    /// Asserts that packed weights have the shape `[k · H, n · H]`.
    pub(crate) fn check_weight(&self, kernel: &str, weight: &super::pack::PackedMatrix, k: usize, n: usize) {
        let (got, expected) = ((weight.k(), weight.n()), (k * self.hidden_size, n * self.hidden_size));
        assert!(
            got == expected,
            "{kernel}: weight_hh is packed as {got:?}, expected {expected:?} (hidden_size {})",
            self.hidden_size
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The shapes on which every cell is compared with the oracle: rows, H, T.
    pub(crate) fn odd_shapes() -> Vec<SequenceShape> {
        let mut shapes = Vec::new();
        for rows in [1, 7, 33] {
            for hidden_size in [1, 7, 33, 150] {
                for seq_len in [1, 2, 9] {
                    shapes.push(SequenceShape { seq_len, rows, hidden_size });
                }
            }
        }
        shapes
    }

    /// Numbers in [-scale, scale), different for each salt.
    pub(crate) fn numbers(len: usize, scale: f32, salt: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|at| {
                let bits = protocol::random::mix64(at ^ (salt << 40));
                scale * ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect()
    }

    pub(crate) fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// One row of `[T][rows][width]`, as the oracle takes it: `[T][width]`.
    pub(crate) fn row_of(x: &[f32], rows: usize, row: usize, width: usize) -> Vec<f64> {
        x.chunks_exact(rows * width).flat_map(|step| widen(&step[row * width..(row + 1) * width])).collect()
    }

    /// max|got - want| / max|want| of one tensor.
    pub(crate) fn distance(got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(1e-30f64, |scale, x| scale.max(x.abs()));
        got.iter().zip(want).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs())) / scale
    }

    #[test]
    #[should_panic(
        expected = "lstm_forward: gates has 31 elements, expected 32 (2 steps · 4 rows · 4 · hidden_size 1)"
    )]
    fn a_wrong_length_is_named() {
        SequenceShape { seq_len: 2, rows: 4, hidden_size: 1 }.check("lstm_forward", "gates", 31, 2, 4);
    }
}
