//! Prints how many characters a second one stream reads: `cargo run --release --example reading_rate [LEVEL]`.

use std::hint::black_box;
use std::time::Instant;

use kernels::Simd;
use model::cpu::CpuBackend;
use model::device::{Backend, Device, StepInput};
use model::init::initial_parameters;
use protocol::batch::DataShape;
use protocol::cell::Cell;
use protocol::job::JobFile;
use protocol::layout::{ModelShape, StateLayout};
use protocol::schedule::Schedule;

const STEPS: u32 = 20_000;
const TOKENS: usize = 65;

fn main() {
    let simd = match std::env::args().nth(1) {
        Some(name) => name.parse().unwrap_or_else(|error| panic!("{error}")),
        None => Simd::detect(),
    };
    println!("{simd}, one thread, characters per second, best of 5");
    for (cell, num_layers, hidden_size) in
        [(Cell::Lstm, 2, 128), (Cell::Gru, 2, 128), (Cell::Rnn, 2, 128), (Cell::Lstm, 2, 512)]
    {
        let sizes = [
            ("cell", cell.to_string()),
            ("num_layers", num_layers.to_string()),
            ("hidden_size", hidden_size.to_string()),
        ];
        let settings = sizes.map(|(key, value)| (key.to_owned(), value));
        let job = JobFile::resolve("char-lstm", None, &settings).expect("the settings fit").job;
        let model = ModelShape::of(&job, TOKENS, TOKENS);
        let schedule = Schedule { steps_per_epoch: 1, evaluation_batches: 0, total_steps: 1 };
        let layout = StateLayout::new(model.clone(), 1);
        let data = DataShape { model, seq_len: 50, schedule };
        let parameters = initial_parameters(&layout, &job);
        let mut device = CpuBackend::new(simd, 1).open(&layout, &job, &data, false).expect("a thread starts");
        let mut reader = device.reader(&parameters).expect("a reader opens");
        let mut logits = vec![0.0; TOKENS];
        let rate = (0..5)
            .map(|_| {
                let start = Instant::now();
                for step in 0..STEPS {
                    let input = StepInput::Token(step % TOKENS as u32);
                    device.read(&mut reader, input, black_box(&mut logits)).expect("it reads");
                }
                f64::from(STEPS) / start.elapsed().as_secs_f64()
            })
            .fold(0.0, f64::max);
        println!("  {num_layers} x {cell:?} {hidden_size}, V {TOKENS}: {rate:.0}");
    }
}
