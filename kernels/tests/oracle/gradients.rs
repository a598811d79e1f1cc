//! The oracle's gradients against central differences of its loss: every cell with every option, every direction and
//! pattern of lengths, everything that is learnt or fed.
//!
//! Small networks are checked in every parameter, large ones along random directions. `LOCKSTEP_LONG=1` runs all
//! combinations of the tables, and the largest size for every cell; without it a part of them runs.

use kernels::oracle::activation::{Activation, RecurrentActivation};
use kernels::oracle::cell::Cell;
use kernels::oracle::gru::Gru;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{Batch, Network, Outcome};
use kernels::oracle::rnn::Rnn;

use crate::combinations::{
    Combination, Example, all_cells, combinations_of_cells, combinations_of_size,
    combinations_of_surroundings, few_cells, long,
};
use crate::largest::Largest;
use crate::numbers::numbers;

/// The largest difference allowed, as a share of the tensor's largest gradient, or of a thousandth of the largest
/// gradient of all where that is more.
const LIMIT: f64 = 1e-7;

/// Steps of a difference, the preferred first. A shorter one is taken where a longer one crosses a corner.
const DIFFERENCES: [f64; 4] = [1e-3, 1e-4, 1e-5, 1e-6];

/// Which derivatives of a tensor are compared.
#[derive(Clone, Copy, PartialEq)]
enum Along {
    EveryNumber,
    EightRandomDirections,
}

/// What all combinations add up to.
#[derive(Default)]
struct Tally {
    combinations: usize,
    largest: Largest,
    shortened: usize,
    /// Combinations in which numbers lay on both sides of a corner: of relu, of the hard sigmoid, of the clip.
    corners: [usize; 3],
}

/// A loss as a function of one point: the parameters, and behind them the fed state where there is one.
struct Loss {
    network: Network,
    example: Example,
    parameter_count: usize,
}

impl Loss {
    fn batch<'a>(&'a self, point: &'a [f64]) -> Batch<'a> {
        let fed_state = (point.len() > self.parameter_count).then_some(&point[self.parameter_count..]);
        Batch { fed_state, ..self.example.batch() }
    }

    fn outcome(&self, point: &[f64]) -> Outcome {
        self.network.evaluate(&point[..self.parameter_count], &self.batch(point))
    }

    fn outcome_with_gradient(&self, point: &[f64]) -> (Outcome, Vec<f64>) {
        let outcome = self.network.forward_backward(&point[..self.parameter_count], &self.batch(point));
        let mut gradient = [&outcome.gradient[..], &outcome.d_fed_state].concat();
        gradient.truncate(point.len());
        (outcome, gradient)
    }
}

/// Compares every gradient of a combination with differences.
fn check(combination: &Combination, along: Along, tally: &mut Tally) {
    let network = combination.network();
    let layout = network.layout();
    let (base, example) = (combination.point(&network), combination.example(&network));
    let loss = Loss { network, example, parameter_count: layout.parameter_count() };
    let (outcome, gradient) = loss.outcome_with_gradient(&base);
    let sides = sides(combination.cell, &outcome);
    let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
    assert!(largest > 1e-3, "{combination:?} has a gradient");

    let mut tensors: Vec<_> = layout.tensors.iter().map(|t| (t.name.as_str(), t.range.clone())).collect();
    if combination.fed {
        tensors.push(("fed state", layout.parameter_count()..base.len()));
    }
    for (name, range) in tensors {
        let scale = gradient[range.clone()].iter().fold(1e-3 * largest, |scale, g| scale.max(g.abs()));
        for direction in directions(range.len(), along) {
            let got: f64 = gradient[range.clone()].iter().zip(&direction).map(|(g, d)| g * d).sum();
            let moved = |by: f64| {
                let mut point = base.clone();
                point[range.clone()].iter_mut().zip(&direction).for_each(|(x, d)| *x += by * d);
                let outcome = loss.outcome(&point);
                (self::sides(combination.cell, &outcome) == sides).then_some(outcome.loss_sum)
            };
            let (tried, want) = (DIFFERENCES.iter().enumerate())
                .find_map(|(tried, &step)| Some((tried, slope(&moved, step)?)))
                .unwrap_or_else(|| panic!("{name} of {combination:?}: every difference crosses a corner"));
            tally.shortened += usize::from(tried > 0);
            tally.largest.note((got - want).abs() / scale, LIMIT, || format!("{name} of {combination:?}"));
        }
    }
    tally.combinations += 1;
    tally.note_corners(&sides);
}

/// Unit vectors of a tensor.
fn directions(len: usize, along: Along) -> Vec<Vec<f64>> {
    match along {
        Along::EveryNumber => {
            (0..len).map(|at| (0..len).map(|other| f64::from(other == at)).collect()).collect()
        }
        Along::EightRandomDirections => (0..8).map(|salt| unit(numbers(len, 1.0, 10 + salt))).collect(),
    }
}

/// The central difference of fourth order: the error of the plain one would hide a small fault.
fn slope(moved: &impl Fn(f64) -> Option<f64>, step: f64) -> Option<f64> {
    let near = moved(step)? - moved(-step)?;
    let far = moved(2.0 * step)? - moved(-2.0 * step)?;
    Some((8.0 * near - far) / (12.0 * step))
}

fn unit(direction: Vec<f64>) -> Vec<f64> {
    let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    direction.iter().map(|x| x / norm).collect()
}

/// On which side of its corners each number lies: of relu, of the hard sigmoid, of the clip. Differences hold only
/// between points where all are on the same sides.
fn sides(cell: Cell, outcome: &Outcome) -> [Vec<bool>; 3] {
    let runs = || {
        let layers = outcome.traces.iter().flat_map(|row| &row.layers);
        layers.flat_map(|layer| &layer.directions).flat_map(|direction| &direction.runs).map(|run| &run.trace)
    };
    let mut sides = [(); 3].map(|()| Vec::new());
    let [relu, hard, clip] = &mut sides;
    match cell {
        Cell::Rnn(Rnn { activation: Activation::Relu }) => {
            relu.extend(runs().flat_map(|trace| trace.outputs()).map(|h| *h > 0.0));
        }
        Cell::Lstm(Lstm { recurrent_activation: RecurrentActivation::HardSigmoid, .. })
        | Cell::Gru(Gru { recurrent_activation: RecurrentActivation::HardSigmoid, .. }) => {
            hard.extend(runs().flat_map(|trace| &trace.gates).flat_map(|gate| [*gate == 0.0, *gate == 1.0]));
        }
        _ => {}
    }
    if let Cell::Lstm(Lstm { cell_clip: Some(limit), .. }) = cell {
        clip.extend(runs().flat_map(|trace| &trace.c).map(|c| c.abs() == limit));
    }
    sides
}

impl Tally {
    fn note_corners(&mut self, sides: &[Vec<bool>; 3]) {
        for (corners, sides) in self.corners.iter_mut().zip(sides) {
            *corners += usize::from(sides.contains(&true) && sides.contains(&false));
        }
    }

    fn print(&self, what: &str) {
        let Tally { combinations, shortened, corners: [relu, hard, clip], .. } = self;
        println!(
            "{what}: {combinations} combinations; on both sides of relu {relu}, hard sigmoid {hard}, clip {clip}; \
             {shortened} differences shortened"
        );
        self.largest.print(what);
        assert!(self.corners.iter().all(|&corners| corners > 0), "{what}: a corner was never met");
    }
}

#[test]
fn every_parameter_of_every_cell() {
    let mut tally = Tally::default();
    for combination in combinations_of_cells() {
        check(&combination, Along::EveryNumber, &mut tally);
    }
    tally.print("every parameter, every cell");
}

#[test]
fn every_parameter_in_all_surroundings() {
    let mut tally = Tally::default();
    // 11 shares no factor with the number of any choice, so an eleventh has all of them.
    for combination in combinations_of_surroundings().into_iter().step_by(if long() { 1 } else { 11 }) {
        check(&combination, Along::EveryNumber, &mut tally);
    }
    tally.print("every parameter, all surroundings");
}

#[test]
fn random_directions_of_large_cells() {
    let mut tally = Tally::default();
    for combination in combinations_of_size(all_cells(), 33) {
        check(&combination, Along::EightRandomDirections, &mut tally);
    }
    for combination in combinations_of_size(if long() { all_cells() } else { few_cells() }, 150) {
        check(&combination, Along::EightRandomDirections, &mut tally);
    }
    tally.print("random directions, H 33 and 150");
}
