//! What must hold of windows, resets, padding and directions, whatever the cell.

use kernels::oracle::activation::Activation;
use kernels::oracle::cell::Cell;
use kernels::oracle::gru::{Gru, Reset};
use kernels::oracle::head::Head;
use kernels::oracle::layer::Layer;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{Batch, Input, Network, Outcome};
use kernels::oracle::rnn::Rnn;
use kernels::oracle::stack::{InitialState, Stack};

use crate::largest::distance;
use crate::numbers::numbers;

const INPUT_SIZE: usize = 3;

fn cells() -> [Cell; 5] {
    let lstm = Lstm { forget_bias: 1.0, peepholes: true, projection: Some(3), ..Lstm::PLAIN };
    let before = Gru { reset: Reset::Before, ..Gru::PLAIN };
    let rnn = Rnn { activation: Activation::Tanh };
    [Cell::Rnn(rnn), Cell::Lstm(Lstm::PLAIN), Cell::Lstm(lstm), Cell::Gru(Gru::PLAIN), Cell::Gru(before)]
}

/// Two layers of a cell under a head at every step, with its parameters.
fn network(cell: Cell, bidirectional: bool, initial_state: InitialState) -> (Network, Vec<f64>) {
    let layers = [5, 4].map(|hidden_size| Layer { cell, hidden_size, bidirectional }).to_vec();
    let stack = Stack { input_size: INPUT_SIZE, layers, initial_state };
    let network = Network { embedding: None, stack, head: Head::EveryStep, classes: 4 };
    let parameters = numbers(network.layout().parameter_count(), 0.8, 1);
    (network, parameters)
}

/// `[6][in]` and a target for each step.
fn row() -> (Vec<f64>, [u32; 6]) {
    (numbers(6 * INPUT_SIZE, 1.0, 2), [3, 0, 2, 1, 1, 3])
}

fn added(parts: &[&Outcome]) -> (f64, Vec<f64>) {
    let gradient =
        (0..parts[0].gradient.len()).map(|at| parts.iter().map(|part| part.gradient[at]).sum()).collect();
    (parts.iter().map(|part| part.loss_sum).sum(), gradient)
}

#[test]
fn windows_with_carried_state_equal_one_long_run() {
    let (inputs, targets) = row();
    for cell in cells() {
        let (network, parameters) = network(cell, false, InitialState::Zero);
        let run = |steps: std::ops::Range<usize>, fed_state| {
            let input = Input::Dense(&inputs[steps.start * INPUT_SIZE..steps.end * INPUT_SIZE]);
            let batch = Batch::new(1, steps.len(), input, &targets[steps]);
            network.evaluate(&parameters, &Batch { fed_state, ..batch })
        };
        let whole = run(0..6, None);
        let first = run(0..2, None);
        let second = run(2..6, Some(&first.final_state));
        assert!((first.loss_sum + second.loss_sum - whole.loss_sum).abs() < 1e-12, "{cell:?}");
        assert_eq!(second.final_state, whole.final_state, "{cell:?}");
    }
}

#[test]
fn a_reset_makes_two_rows_of_one() {
    let (inputs, targets) = row();
    for cell in cells() {
        for bidirectional in [false, true] {
            for initial_state in [InitialState::Zero, InitialState::Learnt] {
                let (network, parameters) = network(cell, bidirectional, initial_state);
                let run = |steps: std::ops::Range<usize>, resets: &[Vec<usize>]| {
                    let input = Input::Dense(&inputs[steps.start * INPUT_SIZE..steps.end * INPUT_SIZE]);
                    let batch = Batch::new(1, steps.len(), input, &targets[steps]);
                    network.forward_backward(&parameters, &Batch { resets: Some(resets), ..batch })
                };
                let broken = run(0..6, &[vec![2]]);
                let (loss, gradient) = added(&[&run(0..2, &[vec![]]), &run(2..6, &[vec![]])]);
                assert!((broken.loss_sum - loss).abs() < 1e-12, "{cell:?}");
                assert!(distance(&broken.gradient, &gradient) < 1e-12, "{cell:?}");
                let whole = run(0..6, &[vec![]]);
                assert!((broken.loss_sum - whole.loss_sum).abs() > 1e-6, "{cell:?}: a reset is seen");
                // Before the first step, the initial state is what it is anyway.
                assert_eq!(run(0..6, &[vec![0]]).gradient, whole.gradient, "{cell:?}");
            }
        }
    }
}

#[test]
fn a_reset_before_the_first_step_forgets_the_fed_state() {
    let (inputs, targets) = row();
    for cell in cells() {
        let (network, parameters) = network(cell, false, InitialState::Learnt);
        let state = numbers(network.stack.state_size(), 1.0, 3);
        let plain = Batch::new(1, 6, Input::Dense(&inputs), &targets);
        let reset = Batch { fed_state: Some(&state), resets: Some(&[vec![0]]), ..plain };
        let (got, want) =
            (network.forward_backward(&parameters, &reset), network.forward_backward(&parameters, &plain));
        assert_eq!((got.gradient, got.loss_sum), (want.gradient, want.loss_sum), "{cell:?}");
        assert!(got.d_fed_state.iter().all(|&d| d == 0.0), "{cell:?}");
    }
}

#[test]
fn what_stands_in_the_padding_is_never_looked_at() {
    let (mut inputs, mut targets) = row();
    for cell in cells() {
        for bidirectional in [false, true] {
            let (network, parameters) = network(cell, bidirectional, InitialState::Learnt);
            let alone = Batch::new(1, 4, Input::Dense(&inputs[..4 * INPUT_SIZE]), &targets[..4]);
            let want = network.forward_backward(&parameters, &alone);
            let (mut padded, mut unheard) = (inputs.clone(), targets);
            padded[4 * INPUT_SIZE..].fill(f64::NAN);
            unheard[4..].fill(u32::MAX);
            let batch = Batch::new(1, 6, Input::Dense(&padded), &unheard);
            let got = network.forward_backward(&parameters, &Batch { lengths: Some(&[4]), ..batch });
            assert_eq!(got.gradient, want.gradient, "{cell:?}");
            assert_eq!(got.final_state, want.final_state, "{cell:?}");
            assert_eq!(
                (got.loss_sum, got.correct, got.predictions),
                (want.loss_sum, want.correct, 4),
                "{cell:?}"
            );
        }
    }
    // The numbers behind the end do matter where they are not padding.
    let (network, parameters) = network(cells()[0], false, InitialState::Zero);
    let mut loss = || {
        inputs[4 * INPUT_SIZE] += 1.0;
        targets[5] = 0;
        network.evaluate(&parameters, &Batch::new(1, 6, Input::Dense(&inputs), &targets)).loss_sum
    };
    assert_ne!(loss(), loss());
}

#[test]
fn a_row_without_a_step_copies_its_state_through() {
    for cell in cells() {
        let (mut network, parameters) = network(cell, true, InitialState::Zero);
        network.head = Head::Final;
        let state = numbers(network.stack.state_size(), 1.0, 3);
        let inputs = vec![f64::NAN; 2 * INPUT_SIZE];
        let batch = Batch::new(1, 2, Input::Dense(&inputs), &[1]);
        let batch = Batch { lengths: Some(&[0]), fed_state: Some(&state), ..batch };
        let got = network.forward_backward(&parameters, &batch);
        assert_eq!(got.final_state, state, "{cell:?}");
        assert!(got.traces[0].outputs.iter().all(|&output| output == 0.0), "{cell:?}");
        assert!(got.d_fed_state.iter().any(|&d| d != 0.0), "{cell:?}: the head reads the fed state");
    }
}
