//! Initial parameters: a pure function of the layout, the seed and the scheme.

mod draw;
mod orthogonal;

use std::ops::Range;

use protocol::cell::Cell;
use protocol::job::{HeadInit, Init, JobSpec};
use protocol::layout::{DirectionRanges, LayerShape, StateLayout};
use protocol::random::{Purpose, Stream};

use draw::Draw;

/// Deviation of the head's weights under [`HeadInit::TruncatedNormal`].
const HEAD_DEVIATION: f64 = 0.1;

/// The flat parameter buffer `[P]` at step 0, from the job's `init`, `init_scale`, `head_init` and `seed`.
///
/// Each tensor draws from its own stream in row-major order, so a tensor's numbers do not depend on the sizes of the
/// tensors before it. See [`Init`] for the schemes; the bounds are computed in f64 and rounded once.
pub fn initial_parameters(layout: &StateLayout, job: &JobSpec) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.parameters()];
    for (range, draw) in draws(layout, job) {
        let is_it = |tensor: &protocol::layout::Tensor| tensor.range == range;
        let index = layout.tensors.iter().position(is_it).expect("every range is a tensor's");
        draw.fill(Stream::new(job.seed, Purpose::Init, [index as u32, 0]), &mut parameters[range]);
    }
    if job.init != Init::Pytorch {
        for (at, layer) in layout.shape.layers().enumerate() {
            for direction in layout.layer(at) {
                open_gates(layout, &layer, &mut parameters[direction.bias_ih.clone()]);
            }
        }
    }
    parameters
}

/// What is not drawn starts at zero: learnt initial states, and but for [`Init::Pytorch`] the biases.
fn draws(layout: &StateLayout, job: &JobSpec) -> Vec<(Range<usize>, Draw)> {
    let scheme = Scheme { init: job.init, scale: scale(job) };
    let mut draws: Vec<_> = layout.embedding().map(|table| (table, scheme.embedding())).into_iter().collect();
    for (at, layer) in layout.shape.layers().enumerate() {
        for direction in layout.layer(at) {
            scheme.direction(&layer, direction, &mut draws);
        }
    }
    let (weight, bias) = layout.head();
    let (width, classes) = (layout.shape.output_width(), layout.shape.classes);
    match job.head_init {
        HeadInit::TruncatedNormal => {
            draws.push((weight, Draw::TruncatedNormal { deviation: HEAD_DEVIATION }));
        }
        HeadInit::Same if job.init == Init::Pytorch => {
            draws.extend([(weight, Draw::within_root(1, width)), (bias, Draw::within_root(1, width))]);
        }
        HeadInit::Same => draws.push((weight, scheme.matrix(width + classes))),
    }
    draws
}

/// `init_scale`, or the scheme's own where it is 0.
fn scale(job: &JobSpec) -> f64 {
    match job.init {
        _ if job.init_scale > 0.0 => job.init_scale,
        Init::TruncatedNormal => 0.1,
        Init::Uniform => 0.05,
        Init::Glorot | Init::Pytorch | Init::Orthogonal | Init::Normal => 1.0,
    }
}

#[derive(Clone, Copy)]
struct Scheme {
    init: Init,
    scale: f64,
}

impl Scheme {
    /// A matrix that Glorot's rule gives this many inputs and outputs together.
    fn matrix(self, fans: usize) -> Draw {
        match self.init {
            Init::Glorot | Init::Orthogonal | Init::Pytorch => Draw::within_root(6, fans),
            Init::TruncatedNormal => Draw::TruncatedNormal { deviation: self.scale },
            Init::Uniform => Draw::Uniform { bound: self.scale },
            Init::Normal => Draw::Normal { deviation: self.scale },
        }
    }

    fn embedding(self) -> Draw {
        match self.init {
            Init::Glorot | Init::Orthogonal => Draw::Uniform { bound: 0.05 },
            Init::Pytorch => Draw::Normal { deviation: 1.0 },
            Init::TruncatedNormal | Init::Uniform | Init::Normal => self.matrix(0),
        }
    }

    fn direction(self, layer: &LayerShape, ranges: &DirectionRanges, draws: &mut Vec<(Range<usize>, Draw)>) {
        let &LayerShape { input_size, hidden_size, output_size, .. } = layer;
        let peepholes = ranges.peepholes.iter().flatten().cloned();
        if self.init == Init::Pytorch {
            let bound = Draw::within_root(1, hidden_size);
            let DirectionRanges { weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, .. } = ranges.clone();
            let matrices = [weight_ih, weight_hh, bias_ih, bias_hh].into_iter().chain(weight_hr);
            draws.extend(matrices.chain(peepholes).map(|range| (range, bound)));
            return;
        }
        let joint = self.matrix(input_size + output_size + layer.gate_size());
        let recurrent = match self.init {
            Init::Orthogonal => {
                Draw::Orthogonal { rows: hidden_size, columns: output_size, scale: self.scale }
            }
            _ => joint,
        };
        // A peephole is a diagonal matrix; √(6 / (H + H)) by Glorot's rule.
        let peephole = self.matrix(2 * hidden_size);
        draws.extend([(ranges.weight_ih.clone(), joint), (ranges.weight_hh.clone(), recurrent)]);
        draws.extend(ranges.weight_hr.clone().map(|range| (range, self.matrix(hidden_size + output_size))));
        draws.extend(peepholes.map(|range| (range, peephole)));
    }
}

/// Lets a fresh cell remember: with the job's `forget_bias`, which is no part of the bias, the sums of the LSTM's f begin
/// with 1, and those of the GRU's r and z do.
fn open_gates(layout: &StateLayout, layer: &LayerShape, bias: &mut [f32]) {
    let hidden = layer.hidden_size;
    match layout.shape.cell {
        Cell::Rnn => {}
        // i, f, g, o
        Cell::Lstm => bias[hidden..2 * hidden].fill(1.0 - layout.shape.options.forget_bias),
        // r, z, n
        Cell::Gru => bias[..2 * hidden].fill(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::job::JobFile;
    use protocol::random::mix64;

    fn job(preset: &str, settings: &[(&str, &str)]) -> JobSpec {
        let settings: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        JobFile::resolve(preset, None, &settings).unwrap().job
    }

    /// Everything that adds a tensor to an LSTM, in one network; H is 32 and 24, R is 8.
    fn rich(settings: &[(&str, &str)]) -> (JobSpec, StateLayout) {
        let rich = [
            ("task", "classify"),
            ("bidirectional", "true"),
            ("hidden_sizes", "[32, 24]"),
            ("projection", "8"),
            ("peepholes", "true"),
            ("forget_bias", "0.25"),
            ("embedding_size", "12"),
            ("initial_state", "learnt"),
        ];
        let job = job("char-lstm", &[&rich[..], settings].concat());
        let layout = StateLayout::of(&job, 40, 3);
        (job, layout)
    }

    fn values<'a>(layout: &StateLayout, parameters: &'a [f32], name: &str) -> &'a [f32] {
        let tensor = layout.tensors.iter().find(|tensor| tensor.name == name);
        &parameters[tensor.unwrap_or_else(|| panic!("no {name}")).range.clone()]
    }

    fn largest(values: &[f32]) -> f64 {
        f64::from(values.iter().fold(0.0, |most, value| value.abs().max(most)))
    }

    #[test]
    fn the_numbers_of_the_first_networks_are_what_they_have_always_been() {
        let cases = [
            ("char-lstm", "glorot", 0xd5a8_b217_84e6_4432),
            ("char-lstm", "pytorch", 0x7f5e_3e16_609c_47d2),
            ("char-gru", "glorot", 0xb19f_acbc_f5cf_ba1c),
            ("char-gru", "pytorch", 0xed92_80fc_63ca_6314),
            ("mnist-gru", "glorot", 0xd225_8b66_55fe_e061),
            ("mnist-gru", "pytorch", 0x015f_a233_ec55_995b),
            ("mnist-rnn", "glorot", 0xbd0a_87f7_2672_4ecf),
            ("mnist-rnn", "pytorch", 0x9bff_c8f0_fa73_3fb0),
        ];
        for (preset, init, expected) in cases {
            let job = job(preset, &[("init", init)]);
            let (input_size, classes) = if preset.starts_with("char") { (65, 65) } else { (28, 10) };
            let layout = StateLayout::of(&job, input_size, classes);
            let parameters = initial_parameters(&layout, &job);
            let hash = parameters.iter().fold(0, |hash: u64, value| mix64(hash ^ u64::from(value.to_bits())));
            assert_eq!(hash, expected, "{preset} {init}: {hash:#x}");
        }
    }

    #[test]
    fn every_tensor_has_the_bound_of_its_scheme() {
        let joint = |input: f64, hidden: f64| (6.0 / (input + 8.0 + 4.0 * hidden)).sqrt();
        let root = |a: f64, b: f64| (a / b).sqrt();
        // Name, bound under glorot, under pytorch.
        let cases = [
            ("rnn.weight_ih_l0", joint(12.0, 32.0), root(1.0, 32.0)),
            ("rnn.weight_hh_l0_reverse", joint(12.0, 32.0), root(1.0, 32.0)),
            ("rnn.weight_ih_l1_reverse", joint(16.0, 24.0), root(1.0, 24.0)),
            ("rnn.weight_hr_l1", root(6.0, 32.0), root(1.0, 24.0)),
            ("rnn.peephole_f_l0", root(3.0, 32.0), root(1.0, 32.0)),
            ("rnn.bias_hh_l1", 0.0, root(1.0, 24.0)),
            ("rnn.initial_h_l0_reverse", 0.0, 0.0),
            ("rnn.initial_c_l1", 0.0, 0.0),
            ("head.weight", root(6.0, 19.0), root(1.0, 16.0)),
            ("head.bias", 0.0, root(1.0, 16.0)),
        ];
        for (init, by_scheme) in [("glorot", 0), ("pytorch", 1)] {
            let (job, layout) = rich(&[("init", init)]);
            let parameters = initial_parameters(&layout, &job);
            for (name, glorot, pytorch) in cases {
                let bound = [glorot, pytorch][by_scheme];
                let most = largest(values(&layout, &parameters, name));
                // Three numbers that are all this far from the bound are the unlikeliest case here.
                assert!(most <= bound * 1.000_001 && most >= 0.5 * bound, "{init} {name}: {most} of {bound}");
            }
        }
        let (job, layout) = rich(&[]);
        let most = largest(values(&layout, &initial_parameters(&layout, &job), "embedding.weight"));
        assert!(most <= 0.05 && most > 0.049, "{most}");
    }

    #[test]
    fn fresh_gates_let_through_in_every_scheme_but_pytorchs() {
        for init in ["glorot", "orthogonal", "truncated_normal", "uniform", "normal"] {
            let (job, layout) = rich(&[("init", init)]);
            let parameters = initial_parameters(&layout, &job);
            for name in ["rnn.bias_ih_l0", "rnn.bias_ih_l0_reverse"] {
                let bias = values(&layout, &parameters, name);
                // With the job's forget_bias of 0.25 beside it, 1.
                assert!(bias[32..64].iter().all(|&b| b == 0.75), "{init} {name}");
                assert!(bias[..32].iter().chain(&bias[64..]).all(|&b| b == 0.0), "{init} {name}");
            }
        }
        let gru = job("mnist-gru", &[]);
        let layout = StateLayout::of(&gru, 28, 10);
        let parameters = initial_parameters(&layout, &gru);
        let bias = values(&layout, &parameters, "rnn.bias_ih_l0");
        assert!(bias[..300].iter().all(|&b| b == 1.0) && bias[300..].iter().all(|&b| b == 0.0));
    }

    #[test]
    fn normal_matrices_have_the_deviation_that_is_asked_for() {
        // A normal cut off at two deviations has this deviation.
        let cut = 0.879_6;
        let cases = [
            ("normal", "0", 1.0, f64::INFINITY),
            ("normal", "0.3", 0.3, f64::INFINITY),
            ("truncated_normal", "0", 0.1 * cut, 0.2),
            ("truncated_normal", "0.5", 0.5 * cut, 1.0),
            ("uniform", "0", 0.05 / 3f64.sqrt(), 0.05),
            ("uniform", "0.2", 0.2 / 3f64.sqrt(), 0.2),
        ];
        for (init, scale, deviation, bound) in cases {
            let (job, layout) = rich(&[("init", init), ("init_scale", scale)]);
            let parameters = initial_parameters(&layout, &job);
            for name in ["embedding.weight", "rnn.weight_ih_l1", "rnn.weight_hh_l0", "rnn.weight_hr_l0"] {
                let values = values(&layout, &parameters, name);
                let mean_square =
                    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
                let ratio = mean_square.sqrt() / deviation;
                assert!((0.85..1.15).contains(&ratio), "{init} {scale} {name}: {ratio} of {deviation}");
                assert!(largest(values) <= bound * 1.000_001, "{init} {scale} {name}");
            }
            assert!(largest(values(&layout, &parameters, "rnn.peephole_o_l1_reverse")) > 0.0);
            assert_eq!(largest(values(&layout, &parameters, "head.bias")), 0.0);
        }
    }

    #[test]
    fn orthogonal_gates_keep_lengths_and_the_rest_is_glorots() {
        let (glorot, layout) = rich(&[]);
        let glorot = initial_parameters(&layout, &glorot);
        for (scale, factor) in [("0", 1.0), ("0.5", 0.5)] {
            let (job, layout) = rich(&[("init", "orthogonal"), ("init_scale", scale)]);
            let parameters = initial_parameters(&layout, &job);
            let weights = values(&layout, &parameters, "rnn.weight_hh_l0");
            for (gate, block) in weights.chunks_exact(32 * 8).enumerate() {
                for (a, b) in (0..8).flat_map(|a| (0..8).map(move |b| (a, b))) {
                    let column = |at: usize| block.iter().skip(at).step_by(8).map(|&v| f64::from(v));
                    let product: f64 = column(a).zip(column(b)).map(|(a, b)| a * b).sum();
                    let expected = if a == b { factor * factor } else { 0.0 };
                    assert!((product - expected).abs() < 1e-6, "gate {gate}, {a} · {b}: {product}");
                }
            }
            for tensor in layout.tensors.iter().filter(|tensor| !tensor.name.contains("weight_hh")) {
                let range = tensor.range.clone();
                assert_eq!(parameters[range.clone()], glorot[range], "{}", tensor.name);
            }
        }
    }

    #[test]
    fn the_head_can_start_as_the_char_rnn_tutorials_do() {
        for init in ["glorot", "pytorch"] {
            let (job, layout) = rich(&[("init", init), ("head_init", "truncated_normal")]);
            let parameters = initial_parameters(&layout, &job);
            let weight = values(&layout, &parameters, "head.weight");
            assert!(largest(weight) <= 0.2 && largest(weight) > 0.1, "{init}");
            assert_eq!(largest(values(&layout, &parameters, "head.bias")), 0.0, "{init}");
        }
    }

    #[test]
    fn seeds_differ_and_decide_everything() {
        for init in ["glorot", "pytorch", "orthogonal", "truncated_normal", "uniform", "normal"] {
            let of_seed = |seed| {
                let (job, layout) = rich(&[("init", init), ("seed", seed)]);
                (initial_parameters(&layout, &job), layout)
            };
            let ((one, layout), (two, _)) = (of_seed("1"), of_seed("2"));
            assert_eq!(of_seed("1").0, one);
            assert!(one.iter().all(|value| value.is_finite()));
            for tensor in &layout.tensors {
                let pairs = one[tensor.range.clone()].iter().zip(&two[tensor.range.clone()]);
                let drawn = pairs.clone().filter(|(a, _)| **a != 0.0 && **a != 0.75).count();
                let equal = pairs.filter(|(a, b)| a == b && **a != 0.0 && **a != 0.75).count();
                assert!(equal <= drawn / 100, "{init}: {equal} of {drawn} equal in {}", tensor.name);
            }
        }
    }
}
