//! Small states and jobs for tests.

use protocol::control::{ControlState, EpochSums};
use protocol::job::JobFile;
use protocol::layout::{Progress, StateLayout};
use protocol::random::mix64;

use super::checkpoint::Checkpoint;
use super::state::StateImage;

/// How many checkpoints tests keep, unless they are about that.
pub(crate) const KEEP: usize = 3;

/// A job with few parameters, and `KEY=VALUE` settings over it.
pub(crate) fn job_file(preset: &str, settings: &[(&str, &str)]) -> JobFile {
    let small = [("hidden_size", "2"), ("num_layers", "1"), ("batch_size", "3"), ("shards", "2")];
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let settings: Vec<_> = small.iter().chain(settings).map(owned).collect();
    JobFile::resolve(preset, None, &settings).unwrap()
}

/// Control state with an infinite loss and one that no short decimal number equals.
pub(crate) fn control(salt: u64) -> ControlState {
    ControlState {
        epoch: EpochSums { loss: 10.0 + salt as f64 / 3.0, weight: 10, correct: 4 },
        first_epoch_loss: 0.1 + 0.2,
        best_validation_loss: f64::INFINITY,
        epochs_without_improvement: 1,
        evaluated_epochs: 2,
        learning_rate_scale: 0.5,
        skipped_updates: 2,
    }
}

/// The state of a small GRU over five characters after `step` steps of epochs of five.
pub(crate) fn checkpoint(step: u64, salt: u64) -> Checkpoint {
    let job = job_file("char-gru", &[("learning_rate", "0.0012345678901234567")]).job;
    let layout = StateLayout::of(&job, 5, 5);
    Checkpoint {
        image: image(&layout, step, salt),
        job,
        data_digest: "d1".to_owned(),
        vocabulary: Some("ab\n\"é".to_owned()),
        labels: None,
    }
}

/// The same with finite numbers for parameters.
pub(crate) fn finite_checkpoint() -> Checkpoint {
    let mut checkpoint = checkpoint(20, 1);
    let layout = checkpoint.image.layout().clone();
    let parameters: Vec<f32> = (0..layout.parameters()).map(|i| i as f32 / 7.0).collect();
    checkpoint.image = StateImage::initial(&layout, &parameters);
    checkpoint
}

/// The same for a small network that reads rows and carries no recurrent state.
pub(crate) fn rows_checkpoint(step: u64) -> Checkpoint {
    let job = job_file("mnist-rnn", &[]).job;
    let layout = StateLayout::of(&job, 28, 10);
    Checkpoint {
        image: image(&layout, step, 0),
        job,
        data_digest: "d2".to_owned(),
        vocabulary: None,
        labels: None,
    }
}

fn image(layout: &StateLayout, step: u64, salt: u64) -> StateImage {
    let floats = 3 * layout.parameters() + layout.recurrent();
    let mut bytes: Vec<u8> =
        (0..floats as u64).flat_map(|i| (mix64(i ^ salt << 32) as u32).to_le_bytes()).collect();
    bytes.extend(Progress::after(step, 5).to_bytes());
    bytes.extend(control(salt).to_bytes());
    StateImage::new(layout, bytes).unwrap()
}
