//! What a run directory and each checkpoint in it are of: one `[job]` over one data set.

use std::fmt;

use protocol::job::{JobSpec, differences};
use protocol::problem::Problem;

pub(crate) const START_OVER: &str = "give another --run-dir, or --fresh to delete this run and start over";

/// One `[job]` over one data set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Identity<'a> {
    /// What is computed.
    pub job: &'a JobSpec,
    /// Identifies the data.
    pub data_digest: &'a str,
}

impl Identity<'_> {
    /// Checks that what was found at `place` is of this job and data.
    ///
    /// # Errors
    /// It is not; every differing key is named with both values.
    pub fn check(self, place: &dyn fmt::Display, found: Identity<'_>) -> Result<(), Problem> {
        let keys = differences(self.job, found.job);
        let mut named: Vec<String> = keys.iter().map(ToString::to_string).collect();
        if self.data_digest != found.data_digest {
            let (there, here) = (found.data_digest, self.data_digest);
            named.push(format!("digest of the data: {there} there, {here} here"));
        }
        if named.is_empty() {
            return Ok(());
        }
        let go_on = match &keys[..] {
            [only] if only.key == "learning_rate" && named.len() == 1 => format!(
                "give --set learning_rate={} to go on as before, and --change-learning-rate {} besides to go on with \
                 another; or ",
                only.there, only.here
            ),
            [only] if only.key == "init_from" && named.len() == 1 => {
                "leave out --init-from to go on with what is there; or ".to_owned()
            }
            _ => String::new(),
        };
        Err(Problem::usage(format!("{place} is of another job: {}", named.join(", ")))
            .hint(format!("{go_on}{START_OVER}")))
    }
}
