//! Random orthogonal matrices.

/// Makes the columns of `matrix` `[rows, columns]` orthonormal, or its rows where those are fewer.
///
/// It becomes the Q of the QR decomposition (of its transpose, where it is wide) whose R has a positive diagonal: a matrix
/// of independent normal numbers turns into a uniformly distributed one. The columns must be linearly independent.
pub(super) fn orthonormalise(matrix: &mut [f64], rows: usize, columns: usize) {
    assert_eq!(matrix.len(), rows * columns);
    if rows < columns {
        let mut tall = transposed(matrix, columns);
        orthonormalise(&mut tall, columns, rows);
        matrix.copy_from_slice(&transposed(&tall, rows));
        return;
    }
    // Once more removes what rounding left of the first time, however close to each other two columns were.
    for _ in 0..2 {
        gram_schmidt(matrix, columns);
    }
}

/// Modified Gram-Schmidt: each column is brought to length 1 and its direction taken out of those behind it. All inner
/// loops go along rows, where no order of additions has to be kept, so that they become vector instructions.
fn gram_schmidt(matrix: &mut [f64], columns: usize) {
    let mut products = vec![0.0; columns];
    for at in 0..columns {
        let square: f64 = matrix.iter().skip(at).step_by(columns).map(|entry| entry * entry).sum();
        let length = square.sqrt();
        products.fill(0.0);
        for row in matrix.chunks_exact_mut(columns) {
            row[at] /= length;
            let unit = row[at];
            for (product, entry) in products[at + 1..].iter_mut().zip(&row[at + 1..]) {
                *product += unit * entry;
            }
        }
        for row in matrix.chunks_exact_mut(columns) {
            let unit = row[at];
            for (entry, product) in row[at + 1..].iter_mut().zip(&products[at + 1..]) {
                *entry -= unit * product;
            }
        }
    }
}

/// The transpose of a matrix with so many columns.
fn transposed(matrix: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest entry of `QᵀQ - 1`.
    fn deviation(matrix: &[f64], columns: usize) -> f64 {
        let mut worst = 0.0_f64;
        for a in 0..columns {
            for b in 0..columns {
                let product: f64 = matrix.chunks_exact(columns).map(|row| row[a] * row[b]).sum();
                worst = worst.max((product - f64::from(a == b)).abs());
            }
        }
        worst
    }

    #[test]
    fn columns_or_rows_are_orthonormal() {
        for (rows, columns) in [(1, 1), (7, 7), (33, 7), (7, 33), (150, 150)] {
            // Nearly parallel columns: one pass alone would leave a visible rest.
            let mut matrix: Vec<f64> =
                (0..rows * columns).map(|i| 1.0 + 1e-6 * libm::sin((i * i) as f64)).collect();
            orthonormalise(&mut matrix, rows, columns);
            let tall = if rows < columns { transposed(&matrix, columns) } else { matrix };
            let worst = deviation(&tall, rows.min(columns));
            assert!(worst < 1e-12, "{rows} x {columns}: {worst:e}");
        }
    }

    #[test]
    fn a_matrix_that_is_orthogonal_stays_as_it_is() {
        let (cosine, sine) = (0.6, 0.8);
        let mut rotation = [cosine, -sine, sine, cosine];
        orthonormalise(&mut rotation, 2, 2);
        for (got, expected) in rotation.into_iter().zip([cosine, -sine, sine, cosine]) {
            assert!((got - expected).abs() < 1e-15);
        }
        let mut scaled = [2.0, 0.0, 0.0, -3.0];
        orthonormalise(&mut scaled, 2, 2);
        assert_eq!(scaled, [1.0, 0.0, 0.0, -1.0]);
    }
}
