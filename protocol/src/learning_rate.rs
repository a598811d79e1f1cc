//! The learning rate of a step: a pure function of the job and of how many steps were done, the same on every machine.

use std::f64::consts::PI;

use crate::job::{Decay, JobSpec};

/// The learning rate of the step after `steps_done` steps, for epochs of `steps_per_epoch` steps.
///
/// `constant`: the job's. `step`: the job's times `decay_factor` for every `decay_epochs` whole epochs done. `cosine`: with
/// p the share of `decay_epochs` epochs that is done, at most 1, and f = `decay_factor`, the job's times
/// `f + (1 - f)·(1 + cos πp) / 2`.
///
/// Numerics: f64, `libm`.
pub fn learning_rate(job: &JobSpec, steps_done: u64, steps_per_epoch: u64) -> f64 {
    let factor = match job.decay {
        Decay::Constant => 1.0,
        Decay::Step => {
            let times = steps_done / steps_per_epoch / u64::from(job.decay_epochs);
            libm::pow(job.decay_factor, times as f64)
        }
        Decay::Cosine => {
            let share = steps_done as f64 / (u64::from(job.decay_epochs) * steps_per_epoch) as f64;
            let floor = job.decay_factor;
            floor + (1.0 - floor) * 0.5 * (1.0 + libm::cos(PI * share.min(1.0)))
        }
    };
    job.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobFile;

    fn rates(decay: &str) -> Vec<f64> {
        let settings =
            [("decay", decay), ("decay_epochs", "2"), ("decay_factor", "0.1"), ("learning_rate", "1")];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let job = JobFile::resolve("char-lstm", None, &settings).unwrap().job;
        [0, 4, 9, 10, 19, 20, 40].map(|step| learning_rate(&job, step, 5)).to_vec()
    }

    #[test]
    fn a_constant_rate_is_the_jobs() {
        assert_eq!(rates("constant"), [1.0; 7]);
    }

    #[test]
    fn steps_come_after_whole_epochs() {
        let expected = [1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.0001];
        for (rate, expected) in rates("step").into_iter().zip(expected) {
            assert!((rate - expected).abs() < 1e-15, "{rate} {expected}");
        }
    }

    #[test]
    fn a_cosine_ends_at_its_floor_and_stays_there() {
        let expected =
            [1.0, 0.1 + 0.45 * (1.0 + (0.4 * PI).cos()), 0.1 + 0.45 * (1.0 + (0.9 * PI).cos()), 0.1, 0.1];
        for (rate, expected) in rates("cosine").into_iter().zip(expected) {
            assert!((rate - expected).abs() < 1e-15, "{rate} {expected}");
        }
    }
}
