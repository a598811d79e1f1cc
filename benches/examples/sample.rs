//! Characters per second of one text that goes on, with char-lstm's network on one thread; prints one JSON line.
//!
//! ```text
//! sample [SECONDS]
//! ```
//!
//! The loop is `lockstep sample`'s, from token to token, without the terminal. The weights are random, which costs what
//! trained ones do. `benches/compare-sample` runs it beside PyTorch.
#![forbid(unsafe_code)]

use std::error::Error;
use std::time::Instant;

use benches::workload::Workload;
use kernels::Simd;
use model::cpu::CpuDevice;
use model::sample::{SampleOptions, Sampler};
use worker::replica::Replica;

/// Characters before the first that is timed.
const WARM_UP: usize = 1000;
/// Characters between two looks at the clock.
const STRETCH: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let seconds = std::env::args().nth(1).map_or(Ok(3.0), |text| text.parse())?;
    let Workload { job, layout, .. } = Workload::new("char-lstm", &[])?;
    let mut device = CpuDevice::new(Simd::detect(), 1, layout.clone(), &job, false)?;
    let parameters = Replica::initial(&device, layout.clone(), &job)?.parameters;
    let options = SampleOptions { temperature: 0.7, top_n: None, seed: 1 };
    let mut sampler = Sampler::new(&mut device, &layout.shape, &parameters, &[0], options)?;

    let mut text = sampler.by_ref().take(WARM_UP).collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < seconds {
        for token in sampler.by_ref().take(STRETCH) {
            text.push(token?);
        }
    }
    let characters = text.len() - WARM_UP;
    let rate = characters as f64 / started.elapsed().as_secs_f64();
    println!(r#"{{"threads": 1, "characters": {characters}, "characters_per_second": {rate:.0}}}"#);
    Ok(())
}
