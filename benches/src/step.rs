//! Whole training steps of the real workers, between two measurements of what the machine can do at most.

use std::sync::Arc;
use std::time::Instant;

use kernels::Simd;
use protocol::job::Precision;
use protocol::message::StepReport;
use protocol::problem::Problem;

use crate::fleet::Fleet;
use crate::roofline::FmaProbe;
use crate::summary::{Summary, median, peak_memory_mib};
use crate::workload::Workload;

/// Steps before the first that is timed.
const WARM_UP: usize = 8;
/// However short the steps are, no more are timed.
const MOST_STEPS: usize = 2000;
/// Measurements of the multiply-adds before the timed steps, and as many after them.
const FMA_MEASUREMENTS: usize = 10;

/// How to measure.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions {
    /// The instructions that compute.
    pub simd: Simd,
    /// Workers in this process, which share the shards.
    pub workers: u32,
    /// Threads of each that compute.
    pub threads: usize,
    /// Steps to time at least.
    pub steps: usize,
    /// Seconds to go on for at least.
    pub seconds: f64,
}

/// What was measured. Times are those of the first worker, from waiting for the batch to the updated parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTimes {
    /// Of whole steps.
    pub steps: Summary,
    /// Of waiting for the other workers' part of them; the copies of a lone worker.
    pub reduce: Summary,
    /// Operations of the matrix products of a step, in units of 10⁹.
    pub gflop_per_step: f64,
    /// Median GFLOP/s of multiply-adds in registers before and after the steps, on as many threads as computed.
    pub fma_rate: f64,
    /// Most memory that the process has held, in MiB.
    pub peak_memory_mib: Option<f64>,
    /// From the start of the process to the end of the first step.
    pub start_to_first_step: f64,
    /// Mean loss of the last step, so that a run that computes nonsense is seen.
    pub loss: f64,
}

impl StepTimes {
    /// Operations of the matrix products for each second of the median step, in units of 10⁹.
    pub fn gflop_s(&self) -> f64 {
        1e3 * self.gflop_per_step / self.steps.median_ms
    }
}

/// Measures the steps of a workload in a process that began at `started`.
///
/// # Errors
/// More workers than shards, or a worker that fails.
pub fn measure(
    workload: &Arc<Workload>,
    options: &StepOptions,
    started: Instant,
) -> Result<StepTimes, Problem> {
    let StepOptions { simd, workers, threads, steps, seconds } = *options;
    let mut fleet = Fleet::start(workload, simd, workers, threads)?;
    fleet.train(|begun| begun < 1)?;
    let start_to_first_step = started.elapsed().as_secs_f64();

    let probe = FmaProbe::new(simd, Precision::F32, workers as usize * threads);
    let mut fma_rates = probe.measure_times(FMA_MEASUREMENTS);
    fleet.train(|begun| begun < WARM_UP - 1)?;
    let warm = Instant::now();
    let goes_on = |begun| begun < steps || (begun < MOST_STEPS && warm.elapsed().as_secs_f64() < seconds);
    let reports = fleet.train(goes_on)?;
    fma_rates.extend(probe.measure_times(FMA_MEASUREMENTS));
    fleet.finish()?;

    let times = |of: fn(&StepReport) -> f64| Summary::of(reports.iter().map(of));
    Ok(StepTimes {
        steps: times(|report| {
            let seconds = report.seconds;
            seconds.data + seconds.compute + seconds.reduce + seconds.update
        }),
        reduce: times(|report| report.seconds.reduce),
        gflop_per_step: workload.gflop_per_step(),
        fma_rate: median(fma_rates),
        peak_memory_mib: peak_memory_mib(),
        start_to_first_step,
        loss: reports.last().expect("at least one step is timed").sums.mean_loss(),
    })
}
