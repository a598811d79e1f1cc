//! Task `rows`: labelled images, read one row of pixels per time step.
//!
//! Training samples are dealt to shards by [`Deal`]. An evaluation reads the test set, or the training images that are
//! held out, in its own order: batch `i` has sample i·B + slot in each slot, and the last one ends where the samples do.

use std::ops::Range;
use std::sync::Arc;

use protocol::batch::{Batch, DataShape, Inputs};
use protocol::job::{JobSpec, RunSpec};
use protocol::layout::ModelShape;
use protocol::problem::Problem;
use protocol::schedule::Work;
use protocol::slots::Deal;

use super::{BatchCut, DataFacts, Dataset, grouped, schedule, shard_batches};
use crate::hex::sha256_hex;

/// Sample ids of the test set have this bit, so that they never equal one of the training set.
const TEST_SAMPLE: u64 = 1 << 32;

/// At least as many classes as there are digits, even if the first samples of a file show fewer.
const FEWEST_CLASSES: usize = 10;

/// Labelled images of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageSet {
    /// Height in pixels.
    pub(super) rows: usize,
    /// Width in pixels.
    pub(super) cols: usize,
    /// `[N][rows][cols]`
    pub(super) pixels: Vec<u8>,
    /// `[N]`
    pub(super) labels: Vec<u8>,
}

/// Images, dealt for one job.
#[derive(Clone)]
pub(super) struct RowsDataset {
    shared: Arc<Shared>,
    /// Each handle has its own, since it remembers the order of the epoch it was last asked for.
    deal: Deal,
}

struct Shared {
    shape: DataShape,
    facts: DataFacts,
    cut: BatchCut,
    train: ImageSet,
    test: ImageSet,
    /// Training images that an evaluation reads; none: it reads the test images.
    held_out: Range<u32>,
}

impl RowsDataset {
    /// Deals the images, which people know as `name`, for this job.
    ///
    /// # Errors
    /// Training and test images differ in size, there are fewer than `train_samples`, or too few are left to fill a
    /// batch.
    pub(super) fn new(
        name: &str,
        train: ImageSet,
        test: ImageSet,
        job: &JobSpec,
        run: &RunSpec,
    ) -> Result<Self, Problem> {
        if (train.rows, train.cols) != (test.rows, test.cols) {
            return Err(Problem::usage(format!(
                "{name}: training images are {} x {} pixels, test images {} x {}",
                train.rows, train.cols, test.rows, test.cols
            )));
        }
        let (samples, held_out) = usable_samples(name, train.labels.len(), job)?;
        let deal = Deal::new(job.seed, samples, job.batch_size, job.shards);
        let steps_per_epoch = deal.steps_per_epoch();
        let (validation_samples, images) = match held_out.len() {
            0 => (test.labels.len() as u64, "images"),
            held_out => (held_out as u64, "training images"),
        };
        let facts = DataFacts {
            name: format!(
                "{name}, {} + {} {images} of {} x {}",
                grouped(samples.into()),
                grouped(validation_samples),
                train.rows,
                train.cols
            ),
            digest: digest(&train, &test),
            vocabulary: None,
            labels: None,
            sample_unit: "images",
            train_samples: samples.into(),
            skipped_per_epoch: u64::from(samples) - steps_per_epoch * u64::from(job.batch_size),
            validation_samples,
        };
        let last_label = train.labels.iter().chain(&test.labels).max().copied().unwrap_or(0);
        let classes = FEWEST_CLASSES.max(usize::from(last_label) + 1);
        let shape = DataShape {
            model: ModelShape::of(job, train.cols, classes),
            seq_len: train.rows,
            schedule: schedule(run, steps_per_epoch, validation_samples.div_ceil(job.batch_size.into())),
        };
        let shared = Arc::new(Shared { shape, facts, cut: BatchCut::new(job), train, test, held_out });
        Ok(Self { shared, deal })
    }
}

impl Dataset for RowsDataset {
    fn shape(&self) -> &DataShape {
        &self.shared.shape
    }

    fn batch(&mut self, work: Work, shards: Range<u32>) -> Batch {
        let Shared { shape, cut, train, test, held_out, .. } = &*self.shared;
        let slots = cut.slots_of(shards.clone());
        let (set, id_bits, filled, samples) = match work {
            Work::Train { epoch, index, .. } => {
                assert!(index < shape.schedule.steps_per_epoch, "{work:?} is not in {:?}", shape.schedule);
                let mut samples = Vec::new();
                for shard in shards.clone() {
                    samples.extend_from_slice(self.deal.samples(epoch, index, shard));
                }
                (train, 0, cut.batch_size, samples)
            }
            Work::Evaluate { index, .. } => {
                let (set, id_bits, samples) = match held_out.is_empty() {
                    true => (test, TEST_SAMPLE, 0..test.labels.len() as u32),
                    false => (train, 0, held_out.clone()),
                };
                let (filled, places) = cut.in_order(samples.len(), index, slots.clone());
                (set, id_bits, filled, places.map(|place| samples.start + place as u32).collect())
            }
        };
        Batch {
            work,
            first_slot: slots.start,
            shards: shard_batches(*cut, shards, filled),
            sample_ids: samples.iter().map(|&sample| u64::from(sample) | id_bits).collect(),
            lengths: vec![shape.seq_len as u32; samples.len()],
            paddings: vec![0; samples.len()],
            inputs: set.inputs(&samples),
        }
    }

    fn facts(&self) -> &DataFacts {
        &self.shared.facts
    }

    fn handle(&self) -> Box<dyn Dataset> {
        Box::new(self.clone())
    }
}

impl ImageSet {
    fn inputs(&self, samples: &[u32]) -> Inputs {
        let size = self.rows * self.cols;
        let image = |&sample: &u32| &self.pixels[sample as usize * size..][..size];
        Inputs::Bytes {
            bytes: samples.iter().flat_map(image).copied().collect(),
            labels: samples.iter().map(|&sample| self.labels[sample as usize].into()).collect(),
        }
    }
}

/// How many of the `available` training images the job learns from, the first ones, and which it holds out.
fn usable_samples(name: &str, available: usize, job: &JobSpec) -> Result<(u32, Range<u32>), Problem> {
    let available = u32::try_from(available).expect("an IDX file counts its images in 32 bits");
    let used = if job.train_samples == 0 { available } else { job.train_samples };
    if used > available {
        return Err(Problem::usage(format!(
            "train_samples is {used}, but {name} has {available} training images"
        ))
        .hint("train_samples = 0 uses all of them"));
    }
    let held_out = job.validation_samples;
    let samples = used.saturating_sub(held_out);
    if held_out > 0 && samples == 0 {
        return Err(Problem::usage(format!(
            "validation_samples is {held_out}, but only {used} training images of {name} are used: none is left to \
             learn from"
        ))
        .hint("choose a smaller validation_samples"));
    }
    if samples < job.batch_size {
        return Err(Problem::usage(format!(
            "batch_size is {}, but only {samples} training images of {name} are used",
            job.batch_size
        ))
        .hint("choose a smaller batch_size"));
    }
    Ok((samples, samples..used))
}

/// Digest of both sets: size, pixels and labels of each.
fn digest(train: &ImageSet, test: &ImageSet) -> String {
    let size = |set: &ImageSet| [set.rows, set.cols].map(|pixels| (pixels as u32).to_le_bytes()).concat();
    let (train_size, test_size) = (size(train), size(test));
    sha256_hex([&train_size[..], &train.pixels, &train.labels, &test_size, &test.pixels, &test.labels])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{job, real_data, refusal, run};
    use super::*;
    use protocol::layout::{Head, Input};

    /// `count` images of 3 x 2 whose pixels all are the sample's number, labelled with its last decimal digit.
    fn numbered(count: u8) -> ImageSet {
        ImageSet {
            rows: 3,
            cols: 2,
            pixels: (0..count).flat_map(|sample| [sample; 6]).collect(),
            labels: (0..count).map(|sample| sample % 10).collect(),
        }
    }

    fn open(train: u8, test: u8, settings: &[(&str, u32)]) -> Result<RowsDataset, Problem> {
        RowsDataset::new("images", numbered(train), numbered(test), &job("mnist-rnn", settings), &run("x"))
    }

    fn train(epoch: u64, index: u64) -> Work {
        Work::Train { step: 0, epoch, index }
    }

    /// Checks that the inputs of a batch are those its sample ids name.
    fn assert_rows_are_the_named_samples(batch: &Batch) {
        let Inputs::Bytes { bytes, labels } = &batch.inputs else { panic!("images give bytes") };
        let samples = || batch.sample_ids.iter().map(|&id| id as u8);
        assert_eq!(*bytes, samples().flat_map(|sample| [sample; 6]).collect::<Vec<_>>());
        assert_eq!(*labels, samples().map(|sample| u16::from(sample % 10)).collect::<Vec<_>>());
    }

    #[test]
    fn an_epoch_reads_each_image_at_most_once_and_any_split_gives_the_same_rows() {
        let mut data = open(200, 30, &[("batch_size", 33), ("shards", 7)]).unwrap();
        assert_eq!(data.shape().schedule.steps_per_epoch, 6);
        assert_eq!((data.facts().train_samples, data.facts().skipped_per_epoch), (200, 2));
        let mut used = Vec::new();
        for index in 0..6 {
            let whole = data.batch(train(1, index), 0..7);
            assert_rows_are_the_named_samples(&whole);
            for cut in 1..7 {
                // Another handle, asked for another epoch in between, gives the same rows.
                let mut other = data.handle();
                other.batch(train(0, index), 0..1);
                let parts = [data.batch(train(1, index), 0..cut), other.batch(train(1, index), cut..7)];
                assert_eq!(parts[1].first_slot as usize, parts[0].rows());
                assert_eq!(parts.map(|part| part.sample_ids).concat(), whole.sample_ids);
            }
            used.extend(whole.sample_ids);
        }
        used.sort_unstable();
        used.dedup();
        assert_eq!(used.len(), 198);
        assert!(used.iter().all(|&id| id < 200));
    }

    #[test]
    fn an_evaluation_reads_the_test_set_in_order_to_its_last_image() {
        let mut data = open(40, 25, &[("batch_size", 10), ("shards", 4)]).unwrap();
        assert_eq!((data.shape().schedule.evaluation_batches, data.facts().validation_samples), (3, 25));
        let mut used = Vec::new();
        for index in 0..3 {
            let batch = data.batch(Work::Evaluate { step: 0, index }, 0..4);
            assert_rows_are_the_named_samples(&batch);
            used.extend(batch.sample_ids);
        }
        assert_eq!(used, (0..25).map(|sample| sample | 1 << 32).collect::<Vec<u64>>());

        // Slots 0..5 of the last batch are filled: shards 0 and 1.
        let last = data.batch(Work::Evaluate { step: 0, index: 2 }, 1..4);
        let rows: Vec<_> = last.shards.iter().map(|shard| (shard.shard, shard.rows.clone())).collect();
        assert_eq!(rows, [(1, 0..3), (2, 3..3), (3, 3..3)]);
        let none = data.batch(Work::Evaluate { step: 0, index: 2 }, 3..4);
        assert_eq!((none.first_slot, none.rows(), none.shards.len()), (7, 0, 1));
    }

    #[test]
    fn train_samples_takes_the_first_images() {
        let mut data = open(200, 30, &[("batch_size", 10), ("train_samples", 40)]).unwrap();
        assert_eq!(data.shape().schedule.steps_per_epoch, 4);
        for index in 0..4 {
            assert!(data.batch(train(0, index), 0..8).sample_ids.iter().all(|&id| id < 40));
        }
        assert_eq!(data.facts().name, "images, 40 + 30 images of 3 x 2");
        let all = open(200, 30, &[("batch_size", 10)]).unwrap();
        assert_eq!(all.facts().digest, data.facts().digest, "the digest is that of the content");
    }

    #[test]
    fn validation_samples_holds_the_last_used_images_out() {
        let settings = [("batch_size", 10), ("shards", 4), ("train_samples", 60), ("validation_samples", 15)];
        let mut data = open(200, 30, &settings).unwrap();
        assert_eq!(data.facts().name, "images, 45 + 15 training images of 3 x 2");
        assert_eq!((data.facts().train_samples, data.facts().skipped_per_epoch), (45, 5));
        assert_eq!((data.shape().schedule.evaluation_batches, data.facts().validation_samples), (2, 15));
        for epoch in 0..3 {
            for index in 0..4 {
                assert!(data.batch(train(epoch, index), 0..4).sample_ids.iter().all(|&id| id < 45));
            }
        }
        let mut used = Vec::new();
        for index in 0..2 {
            let batch = data.batch(Work::Evaluate { step: 0, index }, 0..4);
            assert_rows_are_the_named_samples(&batch);
            used.extend(batch.sample_ids);
        }
        assert_eq!(used, (45..60).collect::<Vec<u64>>());
        let all = open(200, 30, &[("batch_size", 10)]).unwrap();
        assert_eq!(all.facts().digest, data.facts().digest, "the digest is that of the content");
    }

    #[test]
    fn the_network_is_shaped_by_the_images() {
        let data = open(50, 10, &[("batch_size", 10), ("seq_len", 99)]).unwrap();
        let DataShape { model, seq_len, .. } = data.shape();
        assert_eq!((*seq_len, model.input, model.classes, model.head), (3, Input::Bytes(2), 10, Head::Final));
        let mut letters = numbered(50);
        letters.labels[7] = 46;
        let job = job("mnist-rnn", &[("batch_size", 10)]);
        let data = RowsDataset::new("letters", letters, numbered(10), &job, &run("x")).unwrap();
        assert_eq!(data.shape().model.classes, 47);
    }

    #[test]
    fn unusable_images_are_refused_in_words() {
        assert_eq!(
            refusal(open(50, 10, &[("batch_size", 10), ("train_samples", 51)])),
            (
                "train_samples is 51, but images has 50 training images".into(),
                "train_samples = 0 uses all of them".into()
            )
        );
        assert_eq!(
            refusal(open(50, 10, &[("batch_size", 41), ("train_samples", 40)])),
            (
                "batch_size is 41, but only 40 training images of images are used".into(),
                "choose a smaller batch_size".into()
            )
        );
        assert_eq!(
            refusal(open(50, 10, &[("batch_size", 10), ("train_samples", 40), ("validation_samples", 40)])),
            (
                "validation_samples is 40, but only 40 training images of images are used: none is left to learn \
                 from"
                .into(),
                "choose a smaller validation_samples".into()
            )
        );
        assert_eq!(
            refusal(open(50, 10, &[("batch_size", 10), ("validation_samples", 45)])).0,
            "batch_size is 10, but only 5 training images of images are used"
        );
        let mut wide = numbered(12);
        (wide.rows, wide.cols) = (2, 3);
        let job = job("mnist-rnn", &[("batch_size", 10)]);
        let (sentence, _) = refusal(RowsDataset::new("images", numbered(12), wide, &job, &run("x")));
        assert_eq!(sentence, "images: training images are 3 x 2 pixels, test images 2 x 3");
    }

    #[test]
    fn mnist_is_read_whole() {
        let Some(places) = real_data() else { return };
        let job = job("mnist-rnn", &[]);
        let mut data = super::super::open_in(&job, &run("mnist"), &places).unwrap();
        assert_eq!(data.facts().name, "mnist, 60,000 + 10,000 images of 28 x 28");
        let schedule = data.shape().schedule;
        assert_eq!((schedule.steps_per_epoch, schedule.evaluation_batches), (400, 67));
        let batch = data.batch(Work::Evaluate { step: 0, index: 0 }, 0..1);
        let Inputs::Bytes { bytes, labels } = &batch.inputs else { panic!("images give bytes") };
        assert_eq!(labels[..10], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]);
        // The first test image is a seven: nothing in its first rows, a bar in row 8.
        assert_eq!((bytes[..7 * 28].iter().max(), bytes[8 * 28 + 12]), (Some(&0), 198));
    }
}
