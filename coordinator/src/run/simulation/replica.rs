//! What the simulated workers compute: a chain of hashes over the rows of each step, in place of parameters. Whoever
//! leaves out a step, repeats one, or takes other rows or another order, has another chain from there on.

use std::path::Path;

use protocol::batch::Batch;
use protocol::control::ControlState;
use protocol::job::JobFile;
use protocol::layout::{Progress, StateLayout};
use protocol::random::mix64;
use protocol::schedule::{Schedule, Work};
use protocol::sums::{StepSums, row_hash};

use crate::data::{self, Dataset};

/// A small job over a small text.
pub(super) struct Job {
    pub(super) file: JobFile,
    pub(super) data: Box<dyn Dataset>,
    pub(super) layout: StateLayout,
    pub(super) schedule: Schedule,
}

impl Job {
    /// 16 steps in epochs of 6, each with an evaluation of two batches, cut into so many shards. The text is put into
    /// `folder`.
    pub(super) fn new(folder: &Path, shards: u32) -> Self {
        let text = folder.join("text");
        std::fs::write(&text, "the quick fox ".repeat(9)).unwrap();
        let (text, shards) = (text.to_str().unwrap(), shards.to_string());
        let settings = [
            ("num_layers", "1"),
            ("hidden_size", "1"),
            ("batch_size", "7"),
            ("seq_len", "2"),
            ("shards", &shards),
            ("validation_fraction", "0.28"),
            ("divergence_factor", "0"),
            ("data", text),
            ("epochs", "100"),
            ("steps", "16"),
            ("checkpoint_seconds", "1"),
            ("digest_steps", "4"),
            ("sample_chars", "0"),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let file = JobFile::resolve("char-gru", None, &settings).unwrap();
        let data = data::open(&file.job, &file.run, None).unwrap();
        let schedule = data.shape().schedule;
        assert_eq!(schedule, Schedule { steps_per_epoch: 6, evaluation_batches: 2, total_steps: 16 });
        let layout = StateLayout::new(data.shape().model.clone(), file.job.batch_size as usize);
        Self { file, data, layout, schedule }
    }
}

/// What one shard adds to a step: a word for the chain, and its sums.
pub(super) type Part = (u64, StepSums);

/// The state of one worker.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Replica {
    pub(super) step: u64,
    chain: u64,
    pub(super) control: ControlState,
}

impl Replica {
    pub(super) fn initial() -> Self {
        Self { step: 0, chain: 1, control: ControlState::default() }
    }

    /// What the shards of a batch add.
    pub(super) fn parts(&self, batch: &Batch) -> Vec<Part> {
        let (Work::Train { step, index, .. } | Work::Evaluate { step, index }) = batch.work;
        let begin = [step, index, u64::from(matches!(batch.work, Work::Train { .. }))]
            .iter()
            .fold(self.chain, |hash, &word| mix64(hash ^ mix64(word)));
        let part = |shard: &protocol::batch::ShardBatch| {
            let ids = &batch.sample_ids[shard.rows.clone()];
            let word =
                ids.iter().fold(mix64(begin ^ u64::from(shard.shard)), |hash, &id| mix64(hash ^ mix64(id)));
            let weight = batch.lengths[shard.rows.clone()].iter().map(|&steps| u64::from(steps)).sum();
            let sums = StepSums {
                loss: (word % 1000) as f64 / 128.0,
                weight,
                correct: word % (weight + 1),
                rows: ids.len() as u64,
                row_hash: ids.iter().fold(0, |sum: u64, &id| sum.wrapping_add(row_hash(id))),
                non_finite: false,
            };
            (word, sums)
        };
        batch.shards.iter().map(part).collect()
    }

    /// Takes a step; gives its sums and the norm of its gradient.
    pub(super) fn take_step(&mut self, schedule: Schedule, parts: &[Part]) -> (StepSums, f64) {
        self.chain = parts.iter().fold(self.chain, |chain, (word, _)| mix64(chain ^ *word));
        let sums = StepSums::total(&parts.iter().map(|(_, sums)| *sums).collect::<Vec<_>>());
        let norm = (self.chain % 1000) as f64 / 256.0;
        let (_, index) = schedule.position(self.step);
        self.control.after_step(index, schedule.steps_per_epoch, &sums, norm);
        self.step += 1;
        (sums, norm)
    }

    /// Takes an evaluation, of which there are the parts of each batch; gives its sums.
    pub(super) fn take_evaluation(&mut self, schedule: Schedule, batches: &[Vec<Part>]) -> StepSums {
        let of_batch =
            |parts: &Vec<Part>| StepSums::total(&parts.iter().map(|(_, sums)| *sums).collect::<Vec<_>>());
        let sums = batches.iter().map(of_batch).fold(StepSums::default(), StepSums::combine);
        if schedule.ends_epoch(self.step) {
            self.control.after_epoch(&sums);
        }
        sums
    }

    pub(super) fn owes_evaluation(&self, schedule: Schedule) -> bool {
        self.control.owes_evaluation(Progress::after(self.step, schedule.steps_per_epoch).epoch)
    }

    pub(super) fn digest(&self) -> u64 {
        self.control.to_bytes().iter().fold(self.chain, |hash, &byte| mix64(hash ^ u64::from(byte)))
    }

    /// The state as it travels and is written: the chain in place of all floats.
    pub(super) fn image(&self, job: &Job) -> Vec<u8> {
        let floats = job.layout.image_bytes() - Progress::BYTES - ControlState::BYTES;
        let mut image: Vec<u8> = self.chain.to_le_bytes().into_iter().cycle().take(floats).collect();
        image.extend(Progress::after(self.step, job.schedule.steps_per_epoch).to_bytes());
        image.extend(self.control.to_bytes());
        image
    }

    pub(super) fn from_image(image: &[u8]) -> Self {
        let (rest, control) = image.split_last_chunk().unwrap();
        let (_, progress) = rest.split_last_chunk().unwrap();
        Self {
            step: Progress::from_bytes(progress).step,
            chain: u64::from_le_bytes(*image.first_chunk().unwrap()),
            control: ControlState::from_bytes(control),
        }
    }
}
