//! The input projection `W_ih x_t + b` of all steps: what stands beside the GEMM.
//!
//! A dense input is one GEMM over T·rows rows that starts from the bias. A token is a one-hot vector, for which the product
//! is a column of `W_ih`: [`token_table`] writes those columns out as rows, biases included, once per step, and the
//! kernels start from them or have them copied ([`gather_rows`]). Embeddings are gathered by the same function.

use super::reduce::tree_add;
use super::simd::Simd;

/// `table[v] = W[.., v] + bias`: the projection of every token.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight` | `[G·H, V]` | in | `weight_ih` as PyTorch stores it |
/// | `bias` | `[G·H]` | in | `b_ih`, or `b_ih + b_hh` where the cell adds both at once |
/// | `table` | `[V][G·H]` | out | |
///
/// Cost: one sweep over W. Numerics: one addition per element.
pub fn token_table(weight: &[f32], bias: &[f32], table: &mut [f32]) {
    let gates = bias.len();
    let vocabulary = check_transpose("token_table", gates, weight.len(), table.len());
    for (v, row) in table.chunks_exact_mut(gates).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = weight[j * vocabulary + v] + bias[j];
        }
    }
}

/// `out[row] = table[tokens[row]]`.
///
/// `table` is `[V][n]`, `tokens` `[rows]` below V, `out` `[rows][n]`, its rows `stride` apart; what lies between them is
/// left alone. Cost: a copy.
///
/// # Panics
/// If a token is not below V.
pub fn gather_rows(table: &[f32], width: usize, tokens: &[u32], out: &mut [f32], stride: usize) {
    assert!(
        out.len() == stride * tokens.len() && width <= stride,
        "gather_rows: out has {} elements, expected {} rows of {stride}, {width} of each to be written",
        out.len(),
        tokens.len()
    );
    for (row, token) in out.chunks_exact_mut(stride).zip(tokens) {
        row[..width].copy_from_slice(&table[*token as usize * width..][..width]);
    }
}

/// `weight[j][v] = table[v][j]`: a gradient by token turned into that of the weights which [`token_table`] read.
///
/// `table` is `[V][m]`, `weight` `[m][V]`. Cost: one sweep, no arithmetic.
pub fn table_weight(table: &[f32], rows: usize, weight: &mut [f32]) {
    let vocabulary = check_transpose("table_weight", rows, weight.len(), table.len());
    for (v, row) in table.chunks_exact(rows).enumerate() {
        for (j, value) in row.iter().enumerate() {
            weight[j * vocabulary + v] = *value;
        }
    }
}

/// The gradient of a table of which rows were gathered: `d_table[v] = Σ d[row]` over the rows whose token is v. A one-hot
/// input is such a gather too, see [`table_weight`].
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `rows` | (token, `[width]`) | in | in the order of the sum: the (step, row) pairs of one shard |
/// | `d_table` | `[V][width]` | out | |
///
/// Cost: one sweep over the rows. Numerics: the sum rule; from 0, one row after the other.
///
/// # Panics
/// If a token is not below V.
pub fn embedding_gradient<'a>(
    simd: Simd,
    rows: impl Iterator<Item = (u32, &'a [f32])>,
    width: usize,
    d_table: &mut [f32],
) {
    d_table.fill(0.0);
    for (token, row) in rows {
        tree_add(simd, &mut d_table[token as usize * width..][..width], row);
    }
}

fn check_transpose(kernel: &str, gates: usize, weight: usize, table: usize) -> usize {
    assert!(
        weight == table && gates > 0 && weight.is_multiple_of(gates),
        "{kernel}: weight has {weight} and table {table} elements, expected the same multiple of {gates}"
    );
    weight / gates
}

#[cfg(test)]
mod tests {
    use super::super::gemm::{Start, gemm};
    use super::super::pack::PackedMatrix;
    use super::super::sequence::tests::{bits, distance, numbers, widen};
    use super::*;

    #[test]
    fn a_gathered_row_equals_the_product_with_the_one_hot_row() {
        let (vocabulary, gates, tokens) = (13, 20, [3u32, 0, 12, 3, 7]);
        let (weight, bias) = (numbers(gates * vocabulary, 1.0, 1), numbers(gates, 1.0, 2));
        let mut table = vec![f32::NAN; weight.len()];
        token_table(&weight, &bias, &mut table);
        let mut gathered = vec![f32::NAN; tokens.len() * gates];
        gather_rows(&table, gates, &tokens, &mut gathered, gates);

        let mut one_hot = vec![0.0; tokens.len() * vocabulary];
        for (row, token) in tokens.iter().enumerate() {
            one_hot[row * vocabulary + *token as usize] = 1.0;
        }
        let mut packed = PackedMatrix::new(vocabulary, gates);
        packed.pack_columns(Simd::detect(), &weight, vocabulary);
        let mut product = vec![f32::NAN; gathered.len()];
        let start = Start::Row(&bias);
        gemm(Simd::detect(), tokens.len(), &one_hot, vocabulary, &packed, &mut product, gates, start);
        assert_eq!(bits(&gathered), bits(&product));
    }

    #[test]
    fn what_lies_between_the_rows_is_left_alone() {
        let mut out = [9.0; 8];
        gather_rows(&[5.0, 6.0, 7.0, 8.0], 2, &[1, 0], &mut out, 4);
        assert_eq!(out, [7.0, 8.0, 9.0, 9.0, 5.0, 6.0, 9.0, 9.0]);
    }

    #[test]
    fn scattered_gradients_add_up_per_token_in_row_order() {
        let (vocabulary, gates, tokens) = (5, 33, [3u32, 0, 4, 3, 3, 0]);
        let d = numbers(tokens.len() * gates, 1.0, 3);
        let mut want = vec![0.0f64; gates * vocabulary];
        for (token, row) in tokens.iter().zip(d.chunks(gates)) {
            for j in 0..gates {
                want[j * vocabulary + *token as usize] += f64::from(row[j]);
            }
        }
        for simd in Simd::available() {
            let (mut d_table, mut d_weight) = (vec![f32::NAN; want.len()], vec![f32::NAN; want.len()]);
            embedding_gradient(simd, tokens.iter().copied().zip(d.chunks(gates)), gates, &mut d_table);
            table_weight(&d_table, gates, &mut d_weight);
            assert!(distance(&widen(&d_weight), &want) < 1e-6);
            let three = d[..gates][0] + d[3 * gates..][0] + d[4 * gates..][0];
            assert_eq!(d_weight[3].to_bits(), three.to_bits());
        }
    }

    #[test]
    fn an_embeddings_gradient_adds_up_per_token_in_row_order() {
        let (vocabulary, width, tokens) = (5, 33, [3u32, 0, 4, 3, 3, 0]);
        let d = numbers(tokens.len() * width, 1.0, 4);
        let mut want = vec![0.0f32; vocabulary * width];
        for (token, row) in tokens.iter().zip(d.chunks(width)) {
            for j in 0..width {
                want[*token as usize * width + j] += row[j];
            }
        }
        for simd in Simd::available() {
            let mut d_table = vec![f32::NAN; want.len()];
            embedding_gradient(simd, tokens.iter().copied().zip(d.chunks(width)), width, &mut d_table);
            assert_eq!(bits(&d_table), bits(&want));
        }
    }
}
