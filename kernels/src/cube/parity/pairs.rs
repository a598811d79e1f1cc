//! Which cases of the parity cube are run: a few in which every pair of values of two axes occurs, or all.

use super::LAVAPIPE;
use super::case::{Case, Kind, Place};
use protocol::cell::{Activation, Cell, CellOptions, RecurrentActivation, Reset};
use std::collections::{BTreeMap, BTreeSet};

const CELLS: [Cell; 3] = [Cell::Rnn, Cell::Lstm, Cell::Gru];
const ROWS: [usize; 4] = [1, 5, 33, 150];
const HIDDEN: [usize; 6] = [1, 7, 33, 44, 128, 150];
const STEPS: [usize; 4] = [1, 2, 28, 50];
/// Runs of a cube, and units of it where a launch does one step.
const TILES: [(usize, usize); 3] = [(1, 8), (2, 5), (4, 64)];

/// Cell; its activation; peepholes or the place of the reset; clip; projection; H; rows; T; place; tile.
const AXES: [usize; 10] =
    [CELLS.len(), 2, 2, 2, 2, HIDDEN.len(), ROWS.len(), STEPS.len(), Place::ALL.len(), TILES.len()];

/// A case by its value on each axis.
type At = [usize; AXES.len()];

/// Whether the cell looks at an axis; if not, only its first value is taken.
fn has(cell: Cell, axis: usize) -> bool {
    match axis {
        2 => cell != Cell::Rnn,
        3 | 4 => cell == Cell::Lstm,
        _ => true,
    }
}

fn kind(at: At) -> Kind {
    let [_, activation, variant, clip, projection, ..] = at.map(|value| value == 1);
    let options = CellOptions {
        activation: if activation { Activation::Relu } else { Activation::Tanh },
        recurrent_activation: match activation {
            true => RecurrentActivation::HardSigmoid,
            false => RecurrentActivation::Sigmoid,
        },
        reset: if variant { Reset::Before } else { Reset::After },
        peepholes: variant,
        // It cuts off about a third of the cells.
        cell_clip: clip.then_some(0.7),
        projection: projection.then_some(5),
        ..CellOptions::PLAIN
    };
    (CELLS[at[0]], options)
}

fn points() -> impl Iterator<Item = At> {
    let count = AXES.iter().product::<usize>();
    let at = |mut index: usize| {
        AXES.map(|axis| {
            let at = index % axis;
            index /= axis;
            at
        })
    };
    (0..count).map(at).filter(|at| (0..at.len()).all(|axis| at[axis] == 0 || has(CELLS[at[0]], axis)))
}

/// Every cell with every combination of its options.
pub(super) fn kinds() -> Vec<Kind> {
    points().filter(|at| at[5..].iter().all(|value| *value == 0)).map(kind).collect()
}

/// Whether, but for a projection, a cell has all options that change how it is computed, or none.
pub(super) fn has_all_or_none((cell, options): &Kind) -> bool {
    let hard = options.recurrent_activation == RecurrentActivation::HardSigmoid;
    match cell {
        Cell::Rnn => true,
        Cell::Gru => hard == (options.reset == Reset::Before),
        Cell::Lstm => hard == options.peepholes && hard == options.cell_clip.is_some(),
    }
}

fn all() -> Vec<(At, Case)> {
    let case = |at: At| {
        let [.., hidden, rows, steps, place, tile] = at;
        let place = Place::ALL[place];
        Case::new(kind(at), HIDDEN[hidden], ROWS[rows], STEPS[steps], place, TILES[tile])
    };
    points().map(|at| (at, case(at))).filter(|(_, case)| case.fits(LAVAPIPE)).collect()
}

/// Every cell with every combination of its options in every shape; the layouts that lavapipe has room for, in turn.
pub(super) fn full() -> Vec<Case> {
    let mut cases: BTreeMap<Vec<usize>, Vec<Case>> = BTreeMap::new();
    for (at, case) in all() {
        cases.entry(at[..AXES.len() - 2].to_vec()).or_default().push(case);
    }
    cases.into_values().enumerate().map(|(turn, layouts)| layouts[turn % layouts.len()]).collect()
}

fn pairs(at: &At) -> impl Iterator<Item = [usize; 4]> + use<'_> {
    let axes = (0..at.len()).filter(|axis| has(CELLS[at[0]], *axis));
    axes.clone().flat_map(move |a| axes.clone().filter(move |b| *b > a).map(move |b| [a, at[a], b, at[b]]))
}

/// Greedy: the next case is, of some drawn, the one with most new pairs, and of these a cheap one.
pub(super) fn pairwise() -> Vec<Case> {
    let all = all();
    let mut missing: BTreeSet<[usize; 4]> = all.iter().flat_map(|(at, _)| pairs(at)).collect();
    let mut chosen = Vec::new();
    let mut draw = 0u64;
    while let Some(&[a, at_a, b, at_b]) = missing.first() {
        let having: Vec<_> = all
            .iter()
            .filter(|(at, _)| {
                at[a] == at_a && at[b] == at_b && pairs(at).any(|pair| pair == [a, at_a, b, at_b])
            })
            .collect();
        let drawn = (0..200).map(|_| {
            draw += 1;
            having[(protocol::random::mix64(draw) % having.len() as u64) as usize]
        });
        // A factor of ten in work weighs as much as a pair.
        let worth = |(at, case): &(At, Case)| {
            let new = pairs(at).filter(|pair| missing.contains(pair)).count();
            new as f64 - (case.work() as f64).log10()
        };
        let (at, case) = drawn.max_by(|one, other| worth(one).total_cmp(&worth(other))).unwrap();
        pairs(at).for_each(|pair| {
            missing.remove(&pair);
        });
        chosen.push(*case);
    }
    chosen
}
