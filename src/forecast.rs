//! What a run will take, before it starts: memory of its workers, and time.

use coordinator::Forecast;
use coordinator::data::grouped;
use kernels::Simd;
use model::cpu::footprint::Footprint;
use model::cpu::speed::Speed;
use protocol::batch::DataShape;
use protocol::job::JobFile;
use protocol::layout::StateLayout;
use protocol::problem::Problem;
use protocol::slots::shards_of_rank;
use worker::footprint::worker_bytes;

use crate::args::cores;
use crate::memory::available_bytes;

/// State images that a coordinator holds at most: one that arrives, one that is written, and its file's content.
const IMAGES: usize = 3;

/// Estimates for workers with CPU devices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Estimate {
    /// Threads of each worker, if all of them will be on this machine.
    local_threads: Option<usize>,
}

impl Estimate {
    pub(crate) fn new(local_threads: Option<usize>) -> Self {
        Self { local_threads }
    }

    /// Bytes of each member of the fleet; workers beyond the shards only stand by.
    fn workers(self, file: &JobFile, data: &DataShape, layout: &StateLayout) -> Vec<usize> {
        let world_size = file.fleet.workers.min(file.job.shards);
        let threads = self.local_threads.unwrap_or_else(cores);
        (0..world_size)
            .map(|rank| {
                let shards = shards_of_rank(file.job.shards, world_size, rank);
                let (job, recompute) = (&file.job, file.run.recompute);
                let device =
                    Footprint::of(layout, job, data.seq_len, shards.clone(), threads, recompute).total();
                worker_bytes(layout, &file.job, data, shards, world_size, device)
            })
            .collect()
    }
}

impl Forecast for Estimate {
    fn rows(
        &self,
        file: &JobFile,
        data: &DataShape,
        layout: &StateLayout,
    ) -> Result<Vec<(&'static str, String)>, Problem> {
        let workers = self.workers(file, data, layout);
        let largest = workers.iter().max().copied().unwrap_or(0);
        let per_worker = format!("about {} per worker", megabytes(largest as u64));
        let Some(threads) = self.local_threads else { return Ok(vec![("memory", per_worker)]) };

        let available = available_bytes();
        let needed = (workers.iter().sum::<usize>() + IMAGES * layout.image_bytes()) as u64;
        if let Some(available) = available.filter(|available| *available < needed) {
            return Err(does_not_fit(file, needed, available));
        }
        let left = available.map(|bytes| format!(", {} available", megabytes(bytes))).unwrap_or_default();
        let speed = Speed::probe(Simd::detect(), layout, data.seq_len, threads * workers.len());
        let time = about(seconds(data, &speed));
        Ok(vec![("memory", per_worker + &left), ("time", time)])
    }
}

/// Seconds of all steps and evaluations of a run.
fn seconds(data: &DataShape, speed: &Speed) -> f64 {
    let schedule = data.schedule;
    let (epochs, rest) = schedule.position(schedule.total_steps);
    let evaluations = (epochs + u64::from(rest > 0)) * schedule.evaluation_batches;
    schedule.total_steps as f64 * speed.step_seconds + evaluations as f64 * speed.evaluation_seconds
}

fn does_not_fit(file: &JobFile, needed: u64, available: u64) -> Problem {
    let workers = file.fleet.workers;
    Problem::usage(format!(
        "this run would take about {} of memory with {workers} {}, {} are available",
        megabytes(needed),
        if workers == 1 { "worker" } else { "workers" },
        megabytes(available)
    ))
    .hint("choose fewer workers, or a smaller batch_size, seq_len or hidden_size")
}

/// Bytes for people: `12,345 MB`.
fn megabytes(bytes: u64) -> String {
    format!("{} MB", grouped(bytes.div_ceil(1_000_000)))
}

/// Seconds for people, as roughly as they are known.
fn about(seconds: f64) -> String {
    let (number, unit) = match seconds {
        ..5.0 => return "a few seconds".to_owned(),
        ..60.0 => (5.0 * (seconds / 5.0).round(), "s"),
        ..5400.0 => ((seconds / 60.0).round(), "min"),
        ..172_800.0 => ((seconds / 3600.0).round(), "h"),
        _ => ((seconds / 86_400.0).round(), "days"),
    };
    format!("about {number} {unit}, the whole run")
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::schedule::Schedule;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 1, 999_999_999, 1_234_567_890].map(megabytes),
            ["0 MB", "1 MB", "1,000 MB", "1,235 MB"]
        );
        let cases =
            [(0.3, "a few seconds"), (12.0, "about 10 s"), (58.0, "about 60 s"), (70.0, "about 1 min")];
        let longer = [(5000.0, "about 83 min"), (9000.0, "about 3 h"), (1e6, "about 12 days")];
        for (seconds, text) in cases.into_iter().chain(longer) {
            assert!(about(seconds).starts_with(text), "{seconds}: {}", about(seconds));
        }
    }

    #[test]
    fn evaluations_are_counted() {
        let file = JobFile::resolve("char-lstm", None, &[]).unwrap();
        let model = StateLayout::of(&file.job, 5, 5).shape;
        let schedule = Schedule { steps_per_epoch: 10, evaluation_batches: 2, total_steps: 25 };
        let data = DataShape { model, seq_len: 50, schedule };
        let speed = Speed { step_seconds: 2.0, evaluation_seconds: 0.5 };
        assert_eq!(seconds(&data, &speed), 25.0 * 2.0 + 3.0 * 2.0 * 0.5);
    }
}
