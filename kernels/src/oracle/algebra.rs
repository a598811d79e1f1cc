//! Products of a matrix and a vector, and slices by parts.

/// `bias + w · x`, w row-major `[bias.len(), x.len()]`.
pub fn affine(w: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    let mut y = bias.to_vec();
    add_product(w, x, &mut y);
    y
}

/// `y[i] += Σ_j w[i, j] · x[j]`, w row-major `[y.len(), x.len()]`.
pub fn add_product(w: &[f64], x: &[f64], y: &mut [f64]) {
    assert_eq!(w.len(), x.len() * y.len());
    for (row, y) in w.chunks_exact(x.len()).zip(y) {
        *y += row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    }
}

/// `d_x[j] += Σ_i w[i, j] · d_y[i]`.
pub fn add_transposed_product(w: &[f64], d_y: &[f64], d_x: &mut [f64]) {
    assert_eq!(w.len(), d_x.len() * d_y.len());
    for (row, d_y) in w.chunks_exact(d_x.len()).zip(d_y) {
        for (w, d_x) in row.iter().zip(d_x.iter_mut()) {
            *d_x += w * d_y;
        }
    }
}

/// `d_w[i, j] += d_y[i] · x[j]`.
pub fn add_outer_product(d_y: &[f64], x: &[f64], d_w: &mut [f64]) {
    assert_eq!(d_w.len(), x.len() * d_y.len());
    for (row, d_y) in d_w.chunks_exact_mut(x.len()).zip(d_y) {
        for (d_w, x) in row.iter_mut().zip(x) {
            *d_w += d_y * x;
        }
    }
}

/// `y += x`, element by element.
pub fn add(y: &mut [f64], x: &[f64]) {
    assert_eq!(y.len(), x.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `x ∘ y`, element by element.
pub fn hadamard(x: &[f64], y: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| x * y).collect()
}

/// The `N` equal parts of a slice, to be taken apart by name: `let [i, f, g, o] = parts(gates)`.
pub fn parts<const N: usize>(whole: &[f64]) -> [&[f64]; N] {
    assert_eq!(whole.len() % N, 0);
    let len = whole.len() / N;
    std::array::from_fn(|part| &whole[part * len..(part + 1) * len])
}
