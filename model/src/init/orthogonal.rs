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
    gram_schmidt(matrix, columns);
}

/// Modified Gram-Schmidt: each column is taken out of those behind it and brought to length 1. What is left of one column in
/// another is of the size of rounding times the condition of the matrix: far below what an f32 shows, for normal numbers.
///
/// One pass over the rows takes a column out of those behind it and multiplies the next one with them. Its inner loops
/// go along rows, where no order of additions has to be kept, so that they become vector instructions.
fn gram_schmidt(matrix: &mut [f64], columns: usize) {
    // Of the running column with itself and those behind it.
    let mut products = vec![0.0; columns];
    for row in matrix.chunks_exact(columns) {
        add_multiple(&mut products, row[0], row);
    }
    for at in 0..columns {
        let square = products[at];
        let shares: Vec<f64> = products[at + 1..].iter().map(|product| -product / square).collect();
        products.fill(0.0);
        for row in matrix.chunks_exact_mut(columns) {
            let (left, right) = row.split_at_mut(at + 1);
            add_multiple(right, left[at], &shares);
            left[at] /= square.sqrt();
            if let Some(&next) = right.first() {
                add_multiple(&mut products[at + 1..], next, right);
            }
        }
    }
}

/// `sum += factor · values`
fn add_multiple(sum: &mut [f64], factor: f64, values: &[f64]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += factor * value;
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
            let mut matrix: Vec<f64> = (0..rows * columns).map(|i| libm::sin((i * i) as f64)).collect();
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
