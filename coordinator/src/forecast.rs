//! What is known about a run before it starts. What a worker holds and how fast it computes takes knowledge of
//! devices, which the coordinator has not.

use std::fmt::Debug;

use protocol::batch::DataShape;
use protocol::job::JobFile;
use protocol::layout::StateLayout;
use protocol::problem::Problem;

/// Estimates memory and time of a run.
pub trait Forecast: Debug + Send + Sync {
    /// Rows for the table above the run: what, and how much.
    ///
    /// # Errors
    /// The run does not fit on this machine.
    fn rows(
        &self,
        file: &JobFile,
        data: &DataShape,
        layout: &StateLayout,
    ) -> Result<Vec<(&'static str, String)>, Problem>;
}
