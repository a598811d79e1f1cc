//! Measures whole training steps of one preset in candle and prints one JSON line, as `torch_step.py` does.
//!
//! candle-nn's LSTM and GRU on its CPU backend; it has no tanh RNN, so that one is written as its GRU is. A step goes
//! through the layers time step by time step: through `RNN::seq` the gradient of each time step's input would be
//! padded to the whole sequence, which is slower. One-hot rows are gathered from an identity matrix.
#![forbid(unsafe_code)]

#[path = "../../measure.rs"]
mod measure;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rnn::{GRUState, LSTMState};
use candle_nn::{
    AdamW, GRU, GRUConfig, LSTM, LSTMConfig, Linear, Module, Optimizer, ParamsAdamW, RNN, VarBuilder, VarMap,
};

use measure::{BATCHES, CLIP_NORM, Cell, LEARNING_RATE, Preset};

const DEVICE: Device = Device::Cpu;

fn main() {
    measure::measure("candle 0.11.1", |preset| {
        let mut trainer = Trainer::new(preset).expect("a network");
        move |number| trainer.step(number).expect("a training step")
    });
}

enum Layer {
    Rnn { input: Linear, hidden: Linear },
    Lstm(LSTM),
    Gru(GRU),
}

#[derive(Clone)]
enum State {
    Rnn(Tensor),
    Lstm(LSTMState),
    Gru(GRUState),
}

impl State {
    fn hidden(&self) -> &Tensor {
        match self {
            State::Rnn(hidden) => hidden,
            State::Lstm(state) => state.h(),
            State::Gru(state) => state.h(),
        }
    }
}

impl Layer {
    fn new(cell: Cell, input_size: usize, hidden_size: usize, variables: VarBuilder<'_>) -> Result<Self> {
        Ok(match cell {
            Cell::Rnn => Layer::Rnn {
                input: candle_nn::linear(input_size, hidden_size, variables.pp("input"))?,
                hidden: candle_nn::linear(hidden_size, hidden_size, variables.pp("hidden"))?,
            },
            Cell::Lstm => {
                Layer::Lstm(candle_nn::lstm(input_size, hidden_size, LSTMConfig::default(), variables)?)
            }
            Cell::Gru => {
                Layer::Gru(candle_nn::gru(input_size, hidden_size, GRUConfig::default(), variables)?)
            }
        })
    }

    fn zero_state(&self, preset: &Preset) -> Result<State> {
        Ok(match self {
            Layer::Rnn { .. } => {
                State::Rnn(Tensor::zeros((preset.batch_size, preset.hidden_size), DType::F32, &DEVICE)?)
            }
            Layer::Lstm(lstm) => State::Lstm(lstm.zero_state(preset.batch_size)?),
            Layer::Gru(gru) => State::Gru(gru.zero_state(preset.batch_size)?),
        })
    }

    fn step(&self, x: &Tensor, state: &State) -> Result<State> {
        Ok(match (self, state) {
            (Layer::Rnn { input, hidden }, State::Rnn(h)) => {
                State::Rnn((input.forward(x)? + hidden.forward(h)?)?.tanh()?)
            }
            (Layer::Lstm(lstm), State::Lstm(state)) => State::Lstm(lstm.step(x, state)?),
            (Layer::Gru(gru), State::Gru(state)) => State::Gru(gru.step(x, state)?),
            _ => unreachable!("a layer is given its own states"),
        })
    }
}

struct Trainer {
    preset: Preset,
    layers: Vec<Layer>,
    head: Linear,
    variables: VarMap,
    adam: AdamW,
    /// `[V, V]`, for characters.
    one_hot: Tensor,
    /// By batch and time step: characters `[B]`, or rows of images `[B, I]`.
    inputs: Vec<Vec<Tensor>>,
    /// By batch: `[B · T]`, or `[B]`.
    targets: Vec<Tensor>,
}

impl Trainer {
    fn new(preset: Preset) -> Result<Self> {
        let Preset { input_size, hidden_size, classes, batch_size, seq_len, .. } = preset;
        let variables = VarMap::new();
        let builder = VarBuilder::from_varmap(&variables, DType::F32, &DEVICE);
        let layers = (0..preset.layers)
            .map(|layer| {
                let width = if layer == 0 { input_size } else { hidden_size };
                Layer::new(preset.cell, width, hidden_size, builder.pp(format!("layer_{layer}")))
            })
            .collect::<Result<_>>()?;
        let head = candle_nn::linear(hidden_size, classes, builder.pp("head"))?;
        let adam = ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0.0, ..ParamsAdamW::default() };
        let adam = AdamW::new(variables.all_vars(), adam)?;

        let tokens = |below: usize, count: usize| {
            Tensor::rand(0f32, below as f32, count, &DEVICE)?.floor()?.to_dtype(DType::U32)
        };
        let input = || {
            if preset.characters {
                tokens(input_size, batch_size)
            } else {
                Tensor::rand(0f32, 1f32, (batch_size, input_size), &DEVICE)
            }
        };
        let answers = if preset.characters { batch_size * seq_len } else { batch_size };
        Ok(Self {
            preset,
            layers,
            head,
            adam,
            variables,
            one_hot: Tensor::eye(input_size, DType::F32, &DEVICE)?,
            inputs: (0..BATCHES).map(|_| (0..seq_len).map(|_| input()).collect()).collect::<Result<_>>()?,
            targets: (0..BATCHES).map(|_| tokens(classes, answers)).collect::<Result<_>>()?,
        })
    }

    /// Forward, cross-entropy, backward, clipping, Adam; the mean loss.
    fn step(&mut self, number: usize) -> Result<f64> {
        let batch = number % BATCHES;
        let logits = self.forward(&self.inputs[batch])?;
        let loss = candle_nn::loss::cross_entropy(&logits, &self.targets[batch])?;
        let mut gradients = loss.backward()?;

        let variables = self.variables.all_vars();
        let mut squares = 0.0;
        for variable in &variables {
            let gradient = gradients.get(variable).expect("every variable is used");
            squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let scale = CLIP_NORM / (squares.sqrt() + 1e-6);
        if scale < 1.0 {
            for variable in &variables {
                let gradient = gradients.remove(variable).expect("every variable is used");
                gradients.insert(variable, (gradient * scale)?);
            }
        }
        self.adam.step(&gradients)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }

    /// The logits: `[B · T, V]` of characters, `[B, classes]` of images.
    fn forward(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let mut states: Vec<State> =
            self.layers.iter().map(|layer| layer.zero_state(&self.preset)).collect::<Result<_>>()?;
        let mut outputs = Vec::with_capacity(inputs.len());
        for input in inputs {
            let mut x =
                if self.preset.characters { self.one_hot.index_select(input, 0)? } else { input.clone() };
            for (layer, state) in self.layers.iter().zip(&mut states) {
                *state = layer.step(&x, state)?;
                x = state.hidden().clone();
            }
            outputs.push(x);
        }
        if self.preset.characters {
            self.head.forward(&Tensor::stack(&outputs, 1)?.flatten(0, 1)?)
        } else {
            self.head.forward(&outputs[outputs.len() - 1])
        }
    }
}
