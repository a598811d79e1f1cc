//! What the three cells share: matrix-vector products, the logistic function, and the shape of a cell's gradient.

/// The gradient of one row's sequence, as a cell's backward pass returns it.
#[derive(Clone, Debug)]
pub struct SequenceGradient {
    /// `[T][G·H]`: of the input part `W_ih x_t + b_ih`.
    pub d_x: Vec<f64>,
    /// `[T][G·H]`: of the recurrent part `W_hh h_{t-1} + b_hh`. Differs from `d_x` only in the GRU's n gate.
    pub d_h: Vec<f64>,
    /// `[H]`: of the initial hidden state.
    pub d_h0: Vec<f64>,
    /// `[H]`: of the initial cell state; empty where the cell has none.
    pub d_c0: Vec<f64>,
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

/// `y[i] += Σ_j w[i, j] · x[j]`, w row-major `[y.len(), x.len()]`.
pub fn add_product(w: &[f64], x: &[f64], y: &mut [f64]) {
    for (row, y) in w.chunks_exact(x.len()).zip(y) {
        *y += row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    }
}

/// `d_x[j] += Σ_i w[i, j] · d_y[i]`.
pub fn add_transposed_product(w: &[f64], d_y: &[f64], d_x: &mut [f64]) {
    for (row, d_y) in w.chunks_exact(d_x.len()).zip(d_y) {
        for (w, d_x) in row.iter().zip(d_x.iter_mut()) {
            *d_x += w * d_y;
        }
    }
}

/// `d_w[i, j] += d_y[i] · x[j]`.
pub fn add_outer_product(d_y: &[f64], x: &[f64], d_w: &mut [f64]) {
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
