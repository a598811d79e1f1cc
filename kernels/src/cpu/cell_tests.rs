//! What the tests of the three cells have in common: blocks of rows of any lengths, one row of a block, and the three
//! promises: a cell follows the oracle, has the same bits at every level, and gives a row the same bits in any company.

use super::sequence::tests::{bits, distance, numbers, widen};
use super::sequence::{SequenceShape, Step};
use super::simd::Simd;
use crate::oracle::activation;
use crate::oracle::algebra::add_outer_product;
use crate::oracle::parameters::{Peepholes, Recurrent};
use protocol::cell::RecurrentActivation;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// A block and the memory of its shape.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) active: Vec<usize>,
    pub(crate) hidden: usize,
    pub(crate) output: usize,
}

/// How an array is laid out: see `sequence`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    /// `[N][width]`
    Steps,
    /// `[rows + N][width]`
    States,
    /// `[rows][width]`
    Carry,
}

/// One array of a block.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: &'static str,
    pub(crate) layout: Layout,
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

/// Numbers by name.
pub(crate) type Named = Vec<(&'static str, Vec<f64>)>;

/// A cell under test, its options chosen.
pub(crate) trait TestedCell: Debug {
    /// `R` where it is not `H`.
    fn projection(&self) -> Option<usize> {
        None
    }

    /// What a block is given.
    fn inputs(&self, block: &Block) -> Vec<Tensor>;

    /// Forward and backward, with those inputs. What the kernels ought to write starts as NaN.
    fn run(&self, simd: Simd, block: &Block, inputs: &[Tensor]) -> Vec<Tensor>;

    /// The weights' gradients of one row, as a caller forms them from what `run` has left of it.
    fn weight_gradients(&self, block: &Block, outputs: &BTreeMap<&str, Vec<f32>>) -> Named;

    /// One row by the oracle, by the names of `run` and `weight_gradients`. None if a number lies so near a corner of a
    /// piecewise function that the two may stand on different sides.
    fn oracle(&self, block: &Block, inputs: &[Vec<f64>]) -> Option<Named>;
}

impl Block {
    pub(crate) fn new(active: &[usize], hidden: usize) -> Block {
        Block { active: active.to_vec(), hidden, output: hidden }
    }

    pub(crate) fn shape(&self) -> SequenceShape<'_> {
        SequenceShape { active: &self.active, hidden_size: self.hidden, output_size: self.output }
    }

    fn rows(&self) -> usize {
        self.shape().rows()
    }

    /// The steps of one row.
    fn steps_of(&self, row: usize) -> impl Iterator<Item = Step> {
        self.shape().forward().take_while(move |step| step.rows > row)
    }

    /// A block of one of its rows.
    fn alone(&self, row: usize) -> Block {
        Block { active: vec![1; self.steps_of(row).count()], ..*self }
    }

    fn vectors(&self, layout: Layout) -> usize {
        match layout {
            Layout::Steps => self.shape().steps(),
            Layout::States => self.rows() + self.shape().steps(),
            Layout::Carry => self.rows(),
        }
    }
}

impl Tensor {
    /// Numbers in [-scale, scale).
    pub(crate) fn numbers(
        block: &Block,
        name: &'static str,
        layout: Layout,
        width: usize,
        scale: f32,
        salt: u64,
    ) -> Tensor {
        Tensor { name, layout, width, values: numbers(block.vectors(layout) * width, scale, salt) }
    }

    /// NaN, to be written.
    pub(crate) fn unset(block: &Block, name: &'static str, layout: Layout, width: usize) -> Tensor {
        Tensor { name, layout, width, values: vec![f32::NAN; block.vectors(layout) * width] }
    }

    /// The states of which only the `start` is known.
    pub(crate) fn started(block: &Block, name: &'static str, start: &Tensor) -> Tensor {
        let mut states = Tensor::unset(block, name, Layout::States, start.width);
        states.values[..start.values.len()].copy_from_slice(&start.values);
        states
    }

    /// The same numbers by another name.
    pub(crate) fn named(&self, name: &'static str) -> Tensor {
        Tensor { name, ..self.clone() }
    }

    /// All vectors of one row, in the order of its steps.
    fn row(&self, block: &Block, row: usize) -> Vec<f32> {
        let steps = || block.steps_of(row);
        let starts: Vec<usize> = match self.layout {
            Layout::Steps => steps().map(|step| step.range(1).start).collect(),
            Layout::States => [0].into_iter().chain(steps().map(|step| step.after(1).start)).collect(),
            Layout::Carry => vec![0],
        };
        starts
            .iter()
            .flat_map(|start| &self.values[(start + row) * self.width..][..self.width])
            .copied()
            .collect()
    }
}

/// Full blocks of odd sizes, for a cell that all the others are variants of.
pub(crate) fn odd_blocks() -> Vec<Block> {
    let mut blocks = mixed_blocks();
    for rows in [1, 7, 33] {
        for hidden in [1, 7, 33, 150] {
            for seq_len in [1, 2, 9] {
                blocks.push(Block::new(&vec![rows; seq_len], hidden));
            }
        }
    }
    blocks
}

/// Rows of different lengths, of one step, of full length, and one row.
pub(crate) fn mixed_blocks() -> Vec<Block> {
    let lengths: [&[usize]; 4] = [&[9, 9, 4, 2, 2, 1], &[5], &[4, 4, 4], &[1, 1, 1, 1]];
    lengths.iter().flat_map(|active| [7, 33].map(|hidden| Block::new(active, hidden))).collect()
}

/// Compares every row of every block with the oracle, and every level with the widest. Prints the largest distances.
pub(crate) fn assert_follows_the_oracle(cell: &str, cases: &[(&dyn TestedCell, Vec<Block>)]) {
    let mut largest: BTreeMap<&str, f64> = BTreeMap::new();
    let (mut compared, mut near_a_corner) = (0, 0);
    for (cell, blocks) in cases {
        for block in blocks {
            let block = &Block { output: cell.projection().unwrap_or(block.hidden), ..block.clone() };
            let inputs = cell.inputs(block);
            let outputs = cell.run(Simd::detect(), block, &inputs);
            for simd in Simd::available() {
                for (got, want) in cell.run(simd, block, &inputs).iter().zip(&outputs) {
                    assert_eq!(
                        bits(&got.values),
                        bits(&want.values),
                        "{cell:?} {block:?} {simd} {}",
                        got.name
                    );
                }
            }
            let mut note = |name, distance: f64| {
                assert!(distance <= 1e-5, "{cell:?} {block:?}: {name} is {distance:.2e} away");
                let largest = largest.entry(name).or_default();
                *largest = largest.max(distance);
            };
            let mut tensors: BTreeMap<&str, [Vec<f64>; 2]> = BTreeMap::new();
            for row in 0..block.rows() {
                let row_inputs: Vec<_> = inputs.iter().map(|input| widen(&input.row(block, row))).collect();
                let Some(wants) = cell.oracle(block, &row_inputs) else {
                    near_a_corner += 1;
                    continue;
                };
                compared += 1;
                let row_outputs: BTreeMap<_, _> =
                    outputs.iter().map(|output| (output.name, output.row(block, row))).collect();
                let mut gots: BTreeMap<_, _> =
                    cell.weight_gradients(block, &row_outputs).into_iter().collect();
                gots.extend(row_outputs.iter().map(|(name, values)| (*name, widen(values))));
                for (name, want) in wants {
                    // Of an output one wide a row is a handful of sums that may cancel: there all rows have one scale.
                    if block.output > 1 || block.hidden == 1 {
                        note(name, distance(&gots[name], &want));
                    }
                    let [all_got, all_want] = tensors.entry(name).or_default();
                    all_got.extend(&gots[name]);
                    all_want.extend(want);
                }
            }
            for (name, [got, want]) in tensors {
                note(name, distance(&got, &want));
            }
        }
    }
    println!(
        "{cell}: {} cells, {compared} rows against the oracle, {near_a_corner} near a corner:",
        cases.len()
    );
    for (name, distance) in largest {
        println!("  {name} {distance:.2e}");
    }
    assert!(near_a_corner * 10 <= compared, "{near_a_corner} rows near a corner, {compared} compared");
}

/// Compares every row of every block with the same row in a block of its own, bit by bit.
pub(crate) fn assert_rows_are_alone(cells: &[&dyn TestedCell]) {
    for cell in cells {
        for block in mixed_blocks() {
            let block = &Block { output: cell.projection().unwrap_or(block.hidden), ..block };
            let inputs = cell.inputs(block);
            let outputs = cell.run(Simd::detect(), block, &inputs);
            for row in 0..block.rows() {
                let alone = block.alone(row);
                let inputs: Vec<_> = inputs
                    .iter()
                    .map(|input| Tensor { values: input.row(block, row), ..input.clone() })
                    .collect();
                for (got, whole) in cell.run(Simd::detect(), &alone, &inputs).iter().zip(&outputs) {
                    let want = whole.row(block, row);
                    assert_eq!(bits(&got.values), bits(&want), "{cell:?} {block:?} row {row} {}", got.name);
                }
            }
        }
    }
}

/// `Σ_t d_t ⊗ x_t` of one row, `[d_width, x_width]`; of the longer of the two the last vectors are left out.
pub(crate) fn outer_sum(d: &[f32], d_width: usize, x: &[f32], x_width: usize) -> Vec<f64> {
    let mut sum = vec![0.0; d_width * x_width];
    for (d, x) in d.chunks_exact(d_width).zip(x.chunks_exact(x_width)) {
        add_outer_product(&widen(d), &widen(x), &mut sum);
    }
    sum
}

/// The oracle's word for it.
pub(crate) fn oracle_gate(recurrent_activation: RecurrentActivation) -> activation::RecurrentActivation {
    match recurrent_activation {
        RecurrentActivation::Sigmoid => activation::RecurrentActivation::Sigmoid,
        RecurrentActivation::HardSigmoid => activation::RecurrentActivation::HardSigmoid,
    }
}

/// The parameters as the oracle takes them.
pub(crate) fn slices(parameters: &Recurrent<Vec<f64>>) -> Recurrent<&[f64]> {
    let Recurrent { weight_hh, bias_hh, weight_hr, peepholes } = parameters;
    Recurrent {
        weight_hh,
        bias_hh,
        weight_hr: weight_hr.as_deref(),
        peepholes: peepholes.as_ref().map(|p| Peepholes { i: &p.i[..], f: &p.f, o: &p.o }),
    }
}

/// Size of the inputs: hard gates are to be reached on all their three pieces.
pub(crate) fn input_scale(recurrent_activation: RecurrentActivation) -> f32 {
    match recurrent_activation {
        RecurrentActivation::Sigmoid => 2.0,
        RecurrentActivation::HardSigmoid => 4.0,
    }
}

/// Whether a number is so near a corner that rounding decides on which side it falls.
pub(crate) fn is_near(x: f64, corner: f64) -> bool {
    (x - corner).abs() < 1e-4
}
