//! Measures whole training steps of one preset in burn and prints one JSON line, as `torch_step.py` does.
//!
//! burn's own cells and Adam on its Flex backend, which takes half the time of its ndarray backend on these networks.
//! Its optimizer clips each tensor by itself, so the norm of the whole gradient is taken here. One-hot rows are gathered
//! from an identity matrix.
#![forbid(unsafe_code)]

#[path = "../../measure.rs"]
mod measure;

use burn_autodiff::Autodiff;
// What its derive macro calls it.
use burn_core as burn;
use burn_core::module::{Module, ModuleVisitor, Param};
use burn_core::tensor::backend::AutodiffBackend;
use burn_core::tensor::{Distribution, Int, Tensor};
use burn_flex::{Flex, FlexDevice};
use burn_nn::gru::{Gru, GruConfig};
use burn_nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig};

use burn_nn::{Linear, LinearConfig, Lstm, LstmConfig, Rnn, RnnConfig};
use burn_optim::adaptor::OptimizerAdaptor;
use burn_optim::{Adam, AdamConfig, GradientsParams, Optimizer};

use measure::{BATCHES, CLIP_NORM, Cell, LEARNING_RATE, Preset};

type Backend = Autodiff<Flex>;
type Inner = <Backend as AutodiffBackend>::InnerBackend;

const DEVICE: FlexDevice = FlexDevice;

fn main() {
    measure::measure("burn 0.21.0 (flex)", |preset| {
        let mut trainer = Trainer::new(preset);
        move |number| trainer.step(number)
    });
}

#[derive(Module, Debug)]
enum Layer<B: burn_core::tensor::backend::Backend> {
    Rnn(Rnn<B>),
    Lstm(Lstm<B>),
    Gru(Gru<B>),
}

impl Layer<Backend> {
    fn new(cell: Cell, input_size: usize, hidden_size: usize) -> Self {
        match cell {
            Cell::Rnn => Layer::Rnn(RnnConfig::new(input_size, hidden_size, true).init(&DEVICE)),
            Cell::Lstm => Layer::Lstm(LstmConfig::new(input_size, hidden_size, true).init(&DEVICE)),
            Cell::Gru => Layer::Gru(GruConfig::new(input_size, hidden_size, true).init(&DEVICE)),
        }
    }

    /// From `[B, T, I]` to `[B, T, H]`.
    fn forward(&self, x: Tensor<Backend, 3>) -> Tensor<Backend, 3> {
        match self {
            Layer::Rnn(rnn) => rnn.forward(x, None).0,
            Layer::Lstm(lstm) => lstm.forward(x, None).0,
            Layer::Gru(gru) => gru.forward(x, None),
        }
    }
}

#[derive(Module, Debug)]
struct Network<B: burn_core::tensor::backend::Backend> {
    layers: Vec<Layer<B>>,
    head: Linear<B>,
}

/// Random batches, taken in turn.
enum Inputs {
    /// `[B · T]` each.
    Characters(Vec<Tensor<Backend, 1, Int>>),
    /// `[B, T, I]` each.
    Images(Vec<Tensor<Backend, 3>>),
}

struct Trainer {
    preset: Preset,
    /// Taken out while the optimizer has it.
    network: Option<Network<Backend>>,
    loss: CrossEntropyLoss<Backend>,
    adam: OptimizerAdaptor<Adam, Network<Backend>, Backend>,
    /// `[V, V]`, for characters.
    one_hot: Tensor<Backend, 2>,
    inputs: Inputs,
    /// By batch: `[B · T]`, or `[B]`.
    targets: Vec<Tensor<Backend, 1, Int>>,
}

impl Trainer {
    fn new(preset: Preset) -> Self {
        let Preset { input_size, hidden_size, classes, batch_size, seq_len, .. } = preset;
        let layers = (0..preset.layers)
            .map(|layer| {
                Layer::new(preset.cell, if layer == 0 { input_size } else { hidden_size }, hidden_size)
            })
            .collect();
        let head = LinearConfig::new(hidden_size, classes).init(&DEVICE);

        let tokens = |below: usize, count: usize| {
            let line =
                Tensor::<Backend, 1>::random([count], Distribution::Uniform(0.0, below as f64), &DEVICE);
            line.int().clamp(0, below as i64 - 1)
        };
        let inputs = if preset.characters {
            Inputs::Characters((0..BATCHES).map(|_| tokens(input_size, batch_size * seq_len)).collect())
        } else {
            let shape = [batch_size, seq_len, input_size];
            let images = || Tensor::random(shape, Distribution::Uniform(0.0, 1.0), &DEVICE);
            Inputs::Images((0..BATCHES).map(|_| images()).collect())
        };
        let answers = if preset.characters { batch_size * seq_len } else { batch_size };
        Self {
            preset,
            network: Some(Network { layers, head }),
            loss: CrossEntropyLossConfig::new().init(&DEVICE),
            adam: AdamConfig::new().with_epsilon(1e-8).init(),
            one_hot: Tensor::eye(input_size, &DEVICE),
            inputs,
            targets: (0..BATCHES).map(|_| tokens(classes, answers)).collect(),
        }
    }

    /// Forward, cross-entropy, backward, clipping, Adam; the mean loss.
    fn step(&mut self, number: usize) -> f64 {
        let batch = number % BATCHES;
        let network = self.network.take().expect("every step puts it back");
        let loss = self.loss.forward(self.forward(&network, batch), self.targets[batch].clone());
        let mut gradients = GradientsParams::from_grads(loss.backward(), &network);
        clip(&network, &mut gradients);
        self.network = Some(self.adam.step(LEARNING_RATE, network, gradients));
        f64::from(loss.into_scalar())
    }

    /// The logits: `[B · T, V]` of characters, `[B, classes]` of images.
    fn forward(&self, network: &Network<Backend>, batch: usize) -> Tensor<Backend, 2> {
        let Preset { batch_size, seq_len, input_size, hidden_size, .. } = self.preset;
        let mut x = match &self.inputs {
            Inputs::Characters(batches) => self
                .one_hot
                .clone()
                .select(0, batches[batch].clone())
                .reshape([batch_size, seq_len, input_size]),
            Inputs::Images(batches) => batches[batch].clone(),
        };
        for layer in &network.layers {
            x = layer.forward(x);
        }
        network.head.forward(if self.preset.characters {
            x.reshape([batch_size * seq_len, hidden_size])
        } else {
            x.slice([0..batch_size, seq_len - 1..seq_len, 0..hidden_size]).reshape([batch_size, hidden_size])
        })
    }
}

/// Scales the whole gradient to a norm of `CLIP_NORM` at most.
fn clip(network: &Network<Backend>, gradients: &mut GradientsParams) {
    let mut squares = Squares { gradients, sum: Tensor::zeros([1], &DEVICE) };
    network.visit(&mut squares);
    let norm = f64::from(squares.sum.into_scalar()).sqrt();
    let factor = CLIP_NORM / (norm + 1e-6);
    if factor < 1.0 {
        network.visit(&mut Scale { gradients, factor });
    }
}

struct Squares<'a> {
    gradients: &'a GradientsParams,
    sum: Tensor<Inner, 1>,
}

impl ModuleVisitor<Backend> for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<Backend, D>>) {
        if let Some(gradient) = self.gradients.get::<Inner, D>(parameter.id) {
            self.sum = self.sum.clone() + gradient.square().sum();
        }
    }
}

struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor<Backend> for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<Backend, D>>) {
        if let Some(gradient) = self.gradients.remove::<Inner, D>(parameter.id) {
            self.gradients.register(parameter.id, gradient * self.factor);
        }
    }
}
