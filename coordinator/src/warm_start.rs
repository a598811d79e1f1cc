//! A run that starts from given parameters instead of its seed's.

use std::fmt::Debug;

use protocol::job::JobSpec;
use protocol::layout::StateLayout;
use protocol::problem::Problem;

use crate::data::DataFacts;
use crate::store::state::StateImage;

/// Where first parameters come from. Making them takes knowledge of networks, which the coordinator has not.
pub trait InitialParameters: Debug + Send + Sync {
    /// The parameters `[P]` for this job over data with these facts, and a sentence for the user about where they
    /// come from.
    ///
    /// # Errors
    /// They cannot be read or do not fit.
    fn make(
        &self,
        job: &JobSpec,
        facts: &DataFacts,
        layout: &StateLayout,
    ) -> Result<(Vec<f32>, String), Problem>;
}

/// The state at step 0 of such a run.
pub(crate) struct FirstState {
    pub(crate) image: StateImage,
    /// What the user is told about it.
    pub(crate) notice: String,
}

impl FirstState {
    /// Makes the state, and notes in the job what it starts from: it changes the result.
    pub(crate) fn make(
        source: &dyn InitialParameters,
        job: &mut JobSpec,
        facts: &DataFacts,
        layout: &StateLayout,
    ) -> Result<Self, Problem> {
        let (parameters, notice) = source.make(job, facts, layout)?;
        let image = StateImage::initial(layout, &parameters);
        let hash = image.parameter_sha256();
        if !job.init_from.is_empty() && job.init_from != hash {
            return Err(Problem::usage(format!(
                "init_from is {}, but the parameters of --init-from have the sha256 {hash}",
                job.init_from
            ))
            .hint("leave init_from out of --set and of the job file; --init-from writes it"));
        }
        job.init_from = hash;
        Ok(Self { image, notice })
    }
}
