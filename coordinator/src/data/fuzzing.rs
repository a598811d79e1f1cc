//! Doors to the readers of data that have none outside this crate, for fuzzing. Not part of the interface.

use std::path::Path;

use protocol::job::{JobFile, JobSpec, RunSpec};
use protocol::schedule::Work;

use super::images::RowsDataset;
use super::{Dataset, idx, open_text};

/// Opens these bytes as a text, as lines and as labelled lines, and takes the first and last batches of each.
pub fn text(bytes: &[u8]) {
    let readings: [&[(&str, &str)]; 5] = [
        &[],
        &[("targets", "wrap"), ("reset_at", "\"\\n\"")],
        &[("mode", "lines")],
        &[("mode", "lines"), ("pad", "pre"), ("max_len", "3")],
        &[("task", "classify"), ("pad", "pre")],
    ];
    for settings in readings {
        let (job, run) = small("char-lstm", settings);
        if let Ok(data) = open_text("fuzzed", bytes, &job, &run) {
            take_batches(data, job.shards);
        }
    }
}

/// Opens these bytes as a file of images and a file of labels, the first as long as the first two bytes say, and
/// takes the first and last batches.
pub fn idx(bytes: &[u8]) {
    let Some((length, files)) = bytes.split_first_chunk() else { return };
    let (images, labels) = files.split_at(usize::from(u16::from_le_bytes(*length)).min(files.len()));
    let Ok(set) = idx::parse((Path::new("images"), images), (Path::new("labels"), labels), None) else {
        return;
    };
    let (job, run) = small("mnist-rnn", &[]);
    if let Ok(data) = RowsDataset::new("fuzzed", set.clone(), set, &job, &run) {
        take_batches(Box::new(data), job.shards);
    }
}

/// A job that a few samples are enough for.
fn small(preset: &str, settings: &[(&str, &str)]) -> (JobSpec, RunSpec) {
    let sizes = [("batch_size", "2"), ("shards", "2"), ("seq_len", "3"), ("validation_fraction", "0.5")];
    let settings = sizes.iter().chain(settings).map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let file = JobFile::resolve(preset, None, &settings.collect::<Vec<_>>())
        .expect("the job is usable whatever the data");
    (file.job, file.run)
}

fn take_batches(mut data: Box<dyn Dataset>, shards: u32) {
    let schedule = data.shape().schedule;
    let last = schedule.steps_per_epoch - 1;
    for (step, index) in [(0, 0), (last, last)] {
        data.batch(Work::Train { step, epoch: 0, index }, 0..shards);
    }
    if let Some(last) = schedule.evaluation_batches.checked_sub(1) {
        data.batch(Work::Evaluate { step: 1, index: 0 }, 0..shards);
        data.batch(Work::Evaluate { step: 1, index: last }, 0..shards);
    }
}
