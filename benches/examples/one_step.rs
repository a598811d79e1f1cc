//! One training step on one thread, for `scripts/instructions` to count under callgrind.
//!
//! ```text
//! valgrind --tool=callgrind --zero-before='*counted_step*' one_step PRESET [KEY=VALUE ...]
//! ```
//!
//! A first step allocates and is not counted: callgrind forgets everything when it enters [`counted_step`]. The process
//! ends inside that function, so nothing is counted after it either. The level is AVX2; valgrind knows no wider one.
#![forbid(unsafe_code)]

use std::error::Error;
use std::process;

use benches::trainer::Trainer;
use benches::workload::Workload;
use kernels::{Simd, SimdLevel};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let preset = arguments.next().ok_or("usage: one_step PRESET [KEY=VALUE ...]")?;
    let settings: Vec<_> = arguments
        .map(|setting| match setting.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
            None => Err(format!("{setting} is not KEY=VALUE")),
        })
        .collect::<Result<_, _>>()?;
    let workload = Workload::new(&preset, &settings)?;
    let mut trainer = Trainer::new(&workload, Simd::new(SimdLevel::Avx2)?, 1)?;
    trainer.step()?;
    counted_step(&mut trainer)
}

/// The step that is counted.
#[inline(never)]
fn counted_step(trainer: &mut Trainer<'_>) -> ! {
    process::exit(match trainer.step() {
        Ok(_) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            1
        }
    })
}
