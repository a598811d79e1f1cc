//! The CPU device against the f64 oracle: one step's numbers, and whole training steps with every way of clipping and
//! every optimizer.

mod common;

use common::{
    CELLS, Combination, Largest, Outcome, Setup, Sizes, State, TASKS, combinations, combinations_with,
    distance, expected, network, setup, widen,
};
use kernels::oracle::optimizer::{self as oracle, Adam, Sgd, adam, clip_by_global_norm, sgd};
use model::device::Pass;
use protocol::batch::Batch;
use protocol::cell::Cell;
use protocol::job::{Clip, EpsilonPlacement, Optimizer, Task};
use protocol::sums::StepSums;

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-5;

fn add_up(by_shard: &[Vec<f64>]) -> Vec<f64> {
    (0..by_shard[0].len()).map(|at| by_shard.iter().map(|gradient| gradient[at]).sum()).collect()
}

#[test]
fn a_step_equals_the_oracle() {
    let [mut losses, mut states, mut partials, mut gradients] = [(); 4].map(|()| Largest::default());
    for cell in CELLS {
        for task in TASKS {
            for num_layers in [1, 2] {
                // Hidden size 128 once per cell and task: several register tiles and panels.
                for (hidden_size, seq_len) in [(1, 1), (1, 9), (7, 1), (7, 9), (33, 1), (33, 9), (128, 9)] {
                    if hidden_size == 128 && num_layers == 2 {
                        continue;
                    }
                    let sizes =
                        Sizes { cell, task, num_layers, hidden_size, seq_len, batch_size: 5, shards: 3 };
                    let setup = Setup::new(sizes, &[("init", "pytorch")]);
                    let (state, batch) = (setup.start(true), setup.batch(0));
                    let got = setup.alone().pass(Pass::Train { step: 0 }, &state, &batch);
                    let want = expected(
                        &setup,
                        Pass::Train { step: 0 },
                        &widen(&state.parameters),
                        &widen(&state.recurrent),
                        &batch,
                    );

                    let sums = StepSums::total(&got.sums);
                    let targets = if task == Task::Chars { 5 * seq_len } else { 5 };
                    assert_eq!((sums.weight, sums.rows, sums.non_finite), (targets as u64, 5, false));
                    assert_eq!(sums.correct, want.correct, "{sizes:?}");
                    let place = |tensor: &str| format!("{tensor} of {sizes:?}");
                    losses.note((sums.loss - want.loss).abs() / want.loss, 1e-6, || place("loss"));
                    states.note(distance(&got.recurrent, &want.recurrent), LIMIT, || place("state"));
                    let sum = add_up(&want.by_shard);
                    for tensor in &setup.layout.tensors {
                        let range = || tensor.range.clone();
                        // One shard's sum may be all cancellation; all shards together have a scale.
                        let got_parts: Vec<f32> =
                            got.partials.iter().flat_map(|partial| &partial[range()]).copied().collect();
                        let want_parts: Vec<f64> =
                            want.by_shard.iter().flat_map(|partial| &partial[range()]).copied().collect();
                        partials.note(distance(&got_parts, &want_parts), LIMIT, || place(&tensor.name));
                        let difference = distance(&got.gradient[range()], &sum[range()]);
                        gradients.note(difference, LIMIT, || place(&tensor.name));
                    }
                }
            }
        }
    }
    losses.print("loss against f64");
    states.print("final state against f64");
    partials.print("shards' gradient tensors against f64");
    gradients.print("gradient tensors against f64");
}

#[test]
fn every_option_equals_the_oracle() {
    let [mut losses, mut states, mut gradients] = [(); 3].map(|()| Largest::default());
    let mut count = 0;
    let larger = [
        (Cell::Rnn, 33, 1),
        (Cell::Lstm, 33, 5),
        (Cell::Gru, 33, 1),
        (Cell::Lstm, 150, 2),
        (Cell::Gru, 150, 2),
    ]
    .into_iter()
    .flat_map(|(cell, hidden_size, batch_size)| {
        let sizes =
            |task| Sizes { cell, task, num_layers: 2, hidden_size, seq_len: 9, batch_size, shards: 1 };
        let of_cell: &[(&str, &str)] = match cell {
            Cell::Rnn => &[("activation", "relu")],
            Cell::Lstm => &[("peepholes", "true"), ("cell_clip", "0.2"), ("projection", "20")],
            Cell::Gru => &[("reset", "before")],
        };
        let lines = [of_cell, &[("mode", "lines"), ("initial_state", "learnt")]].concat();
        let labelled = [of_cell, &[("bidirectional", "true"), ("embedding_size", "16")]].concat();
        [setup(sizes(Task::Chars), &lines), setup(sizes(Task::Classify), &labelled)]
            .map(|setup| Combination { name: format!("{cell} {hidden_size}, {batch_size} rows"), setup })
    });
    for Combination { name, setup } in combinations().chain(larger) {
        let want_layout = network(&setup).layout();
        let places = |name: &str, shape: &[usize], range: &std::ops::Range<usize>| {
            (name.to_owned(), shape.to_vec(), range.clone())
        };
        let ours = setup.layout.tensors.iter().map(|t| places(&t.name, &t.shape, &t.range));
        assert!(ours.eq(want_layout.tensors.iter().map(|t| places(&t.name, &t.shape, &t.range))), "{name}");

        let pass = Pass::Train { step: 3 };
        let (mut state, batch) = (setup.start(true), setup.batch(3));
        spread(&mut state.parameters);
        let got = setup.alone().pass(pass, &state, &batch);
        let want = expected(&setup, pass, &widen(&state.parameters), &widen(&state.recurrent), &batch);
        let sums = StepSums::total(&got.sums);
        assert_eq!(got.sums.iter().map(|sums| sums.weight).collect::<Vec<_>>(), want.weights, "{name}");
        assert_eq!(sums.correct, want.correct, "{name}");
        losses.note((sums.loss - want.loss).abs() / want.loss, 1e-6, || name.clone());
        states.note(distance(&got.recurrent, &want.recurrent), LIMIT, || name.clone());
        let sum = add_up(&want.by_shard);
        for tensor in &setup.layout.tensors {
            let range = || tensor.range.clone();
            let difference = distance(&got.gradient[range()], &sum[range()]);
            gradients.note(difference, LIMIT, || format!("{} of {name}", tensor.name));
        }
        count += 1;
    }
    println!("{count} combinations of options");
    losses.print("loss against f64");
    states.print("final state against f64");
    gradients.print("gradient tensors against f64");
}

/// The operands of products are off by up to 2^-9 of themselves, so the results are off by some times as much.
#[test]
fn products_of_bf16_stay_near_the_oracle() {
    let [mut losses, mut states, mut gradients] = [(); 3].map(|()| Largest::default());
    for Combination { name, setup } in combinations_with(&[("bf16", &[("precision", "bf16")])]) {
        let pass = Pass::Train { step: 3 };
        let (mut state, batch) = (setup.start(true), setup.batch(3));
        spread(&mut state.parameters);
        let got = setup.alone().pass(pass, &state, &batch);
        let want = expected(&setup, pass, &widen(&state.parameters), &widen(&state.recurrent), &batch);
        let loss = StepSums::total(&got.sums).loss;
        losses.note((loss - want.loss).abs() / want.loss, 0.005, || name.clone());
        states.note(distance(&got.recurrent, &want.recurrent), 0.02, || name.clone());
        let difference = distance(&got.gradient, &add_up(&want.by_shard));
        // At a corner of a function rounding decides which slope it has.
        if !["relu", "hard", "clip", "everything", "keras"].iter().any(|cell| name.contains(cell)) {
            gradients.note(difference, 0.03, || name.clone());
        }
    }
    losses.print("loss of bf16 against f64");
    states.print("final state of bf16 against f64");
    gradients.print("gradient of bf16 against f64");
}

/// Gives parameters that start at zero, or small, something to do.
fn spread(parameters: &mut [f32]) {
    for (at, value) in parameters.iter_mut().enumerate() {
        *value += 0.3 * (at as f32 * 0.7).sin();
    }
}

/// The oracle's training state.
struct Reference {
    parameters: Vec<f64>,
    first_moment: Vec<f64>,
    second_moment: Vec<f64>,
    recurrent: Vec<f64>,
}

impl Reference {
    fn new(state: &State) -> Self {
        Self {
            parameters: widen(&state.parameters),
            first_moment: widen(&state.first_moment),
            second_moment: widen(&state.second_moment),
            recurrent: widen(&state.recurrent),
        }
    }

    /// One step in f64, written from the definition of each way of clipping. Gives how many gradients were clipped
    /// and how many were looked at.
    fn train(&mut self, setup: &Setup, step: u64, batch: &Batch) -> (usize, usize) {
        let job = &setup.job;
        let want = expected(setup, Pass::Train { step }, &self.parameters, &self.recurrent, batch);
        let weights: Vec<f64> = want.weights.iter().map(|&weight| weight as f64).collect();
        let total: f64 = weights.iter().sum();
        let mut clips = (0, 0);
        let mut clip = |mean: &mut [f64]| {
            clips.0 += usize::from(clip_by_global_norm(mean, job.clip_norm) > job.clip_norm);
            clips.1 += 1;
        };
        let mean = match job.clip {
            Clip::None => add_up(&want.by_shard).iter().map(|g| g / total).collect(),
            Clip::Global => {
                let mut mean: Vec<f64> = add_up(&want.by_shard).iter().map(|g| g / total).collect();
                clip(&mut mean);
                mean
            }
            Clip::Shard => {
                let mut weighted = Vec::new();
                for (gradient, weight) in want.by_shard.iter().zip(weights) {
                    let mut mean: Vec<f64> = gradient.iter().map(|g| g / weight).collect();
                    clip(&mut mean);
                    weighted.push(mean.iter().map(|g| g * weight / total).collect());
                }
                add_up(&weighted)
            }
        };
        let Self { parameters, first_moment, second_moment, recurrent } = self;
        let lr = job.learning_rate;
        match job.optimizer {
            Optimizer::Adam => {
                let placement = match job.epsilon_placement {
                    EpsilonPlacement::AfterCorrection => oracle::EpsilonPlacement::AfterCorrection,
                    EpsilonPlacement::BeforeCorrection => oracle::EpsilonPlacement::BeforeCorrection,
                };
                let options =
                    Adam { lr, beta1: job.beta1, beta2: job.beta2, epsilon: job.epsilon, placement };
                adam(options, step + 1, parameters, &mean, first_moment, second_moment);
            }
            Optimizer::Sgd => sgd(Sgd { lr, momentum: job.momentum }, parameters, &mean, first_moment),
        }
        *recurrent = want.recurrent;
        clips
    }
}

#[test]
fn training_steps_equal_the_oracle_with_every_way_of_clipping_and_every_optimizer() {
    // Adam divides a gradient by its own size, so at the default ε an element that is all rounding moves as far as any
    // other, and the limit must allow for it. At the larger ε such a move is small and errors stand out.
    let optimizers: [(&[(&str, &str)], f64); 5] = [
        (&[("epsilon", "1e-8")], LIMIT),
        (&[("epsilon", "1e-4")], 0.1 * LIMIT),
        (&[("epsilon", "1e-4"), ("epsilon_placement", "before_correction")], 0.1 * LIMIT),
        (&[("optimizer", "sgd"), ("learning_rate", "0.1")], 0.1 * LIMIT),
        (&[("optimizer", "sgd"), ("learning_rate", "0.1"), ("momentum", "0.9")], 0.1 * LIMIT),
    ];
    for (optimizer, limit) in optimizers {
        let mut largest = Largest::default();
        for cell in CELLS {
            for task in TASKS {
                for clip in [Clip::Global, Clip::Shard, Clip::None] {
                    three_steps(&mut largest, limit, (cell, task, clip), optimizer);
                }
            }
        }
        largest.print(&format!("parameters after 3 steps against f64, {optimizer:?}"));
    }
}

fn three_steps(
    largest: &mut Largest,
    limit: f64,
    (cell, task, clip): (Cell, Task, Clip),
    optimizer: &[(&str, &str)],
) {
    let sizes = Sizes { cell, task, num_layers: 2, hidden_size: 17, seq_len: 6, batch_size: 7, shards: 3 };
    let word = format!("{clip:?}").to_lowercase();
    let settings = [optimizer, &[("clip", &word), ("init", "pytorch")]].concat();
    let mut setup = Setup::new(sizes, &settings);
    setup.job.clip_norm = middle_norm(&setup);
    let (mut state, mut fleet) = (setup.start(true), setup.alone());
    let mut reference = Reference::new(&state);
    let mut clipped = (0, 0);
    for step in 0..3 {
        let batch = setup.batch(step);
        fleet.train(step, &mut state, &batch);
        let (some, of) = reference.train(&setup, step, &batch);
        clipped = (clipped.0 + some, clipped.1 + of);
    }
    match clip {
        Clip::None => assert_eq!(clipped, (0, 0)),
        _ => assert!(0 < clipped.0 && clipped.0 < clipped.1, "{sizes:?}: {clipped:?} clipped"),
    }
    for tensor in &setup.layout.tensors {
        let range = tensor.range.clone();
        let difference = distance(&state.parameters[range.clone()], &reference.parameters[range]);
        largest.note(difference, limit, || format!("{} of {cell:?} {task:?} {clip:?}", tensor.name));
    }
}

/// A norm that clips some of the first three steps' gradients and leaves others: halfway between the smallest and the
/// largest, of the shards' or of the whole batches' means as the job clips.
fn middle_norm(setup: &Setup) -> f64 {
    let norm = |gradient: &[f64], weight: f64| {
        let mut mean: Vec<f64> = gradient.iter().map(|g| g / weight).collect();
        clip_by_global_norm(&mut mean, 1.0)
    };
    let state = setup.start(true);
    let mut fleet = setup.alone();
    let norms: Vec<f64> = (0..3)
        .flat_map(|step| {
            let Outcome { partials, sums, .. } = fleet.pass(Pass::Train { step }, &state, &setup.batch(step));
            let by_shard: Vec<Vec<f64>> = partials.iter().map(|partial| widen(partial)).collect();
            let weights = sums.iter().map(|sums| sums.weight as f64);
            match setup.job.clip {
                Clip::Shard => by_shard.iter().zip(weights).map(|(g, weight)| norm(g, weight)).collect(),
                _ => vec![norm(&add_up(&by_shard), weights.sum())],
            }
        })
        .collect();
    let (smallest, largest) = norms.iter().fold((f64::MAX, 0.0f64), |(a, b), &n| (a.min(n), b.max(n)));
    0.5 * (smallest + largest)
}
