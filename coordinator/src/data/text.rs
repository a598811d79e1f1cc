//! Task `chars`: any UTF-8 text as a matrix whose rows are the slots of the batch.
//!
//! The text is cut at ⌊n·(1 - validation_fraction)⌋ characters into a training and a validation part. Each part
//! becomes a matrix `[B][m·T]` with m = ⌊(n - 1) / (B·T)⌋: row r is the r-th stretch of contiguous text, and step i
//! of the epoch reads columns i·T .. (i + 1)·T, so that a slot's recurrent state is that of the text just before.
//! The target of a character is the character after it in the text, also across the end of a row; or, where targets
//! wrap, that of a step's last character is the first one of the same row and step. Then no character is needed behind
//! the last row, and m = ⌊n / (B·T)⌋.

use std::ops::Range;
use std::sync::Arc;

use protocol::batch::{Batch, DataShape, Inputs};
use protocol::job::{JobSpec, RunSpec, Targets};
use protocol::layout::ModelShape;
use protocol::problem::Problem;
use protocol::schedule::Work;

use super::tokenizer::{Tokenizer, decode};
use super::vocabulary::Vocabulary;
use super::{BatchCut, DataFacts, Dataset, grouped, schedule, shard_batches};
use crate::hex::sha256_hex;

/// A snapshot of this repository's own sources, written by `scripts/renew-embedded-text`.
pub(super) const EMBEDDED_TEXT: &str = include_str!("../../data/embedded.txt");

/// Counts the snapshots that were ever released.
pub const EMBEDDED_TEXT_VERSION: u32 = 1;

/// What the snapshot must be: a run on embedded data is only repeatable while it stays.
pub(super) const EMBEDDED_TEXT_SHA256: &str =
    "b154229ffe72dfe36b0ef06b1d662db1e3939421b54a0d29792d869bcd526b1a";

/// A text, cut for one job. Cloning shares the text.
#[derive(Clone)]
pub(super) struct TextDataset(Arc<Shared>);

struct Shared {
    shape: DataShape,
    facts: DataFacts,
    cut: BatchCut,
    targets: Targets,
    /// The whole text.
    tokens: Vec<u16>,
    train: Part,
    validation: Part,
}

/// The training or the validation part of the text.
#[derive(Clone, Copy)]
struct Part {
    /// Its first character in the whole text.
    start: usize,
    /// Windows in a row, `m`.
    windows: usize,
}

impl TextDataset {
    /// Cuts the UTF-8 text `bytes`, which people know as `name`, for this job.
    ///
    /// # Errors
    /// The text is empty, not UTF-8, of one or too many distinct characters, lacks the one to reset at, or is too short
    /// for one step.
    pub(super) fn new(name: &str, bytes: &[u8], job: &JobSpec, run: &RunSpec) -> Result<Self, Problem> {
        let text = decode(name, bytes)?;
        let tokenizer = tokenizer(name, text)?;
        let reset_token = reset_token(name, &tokenizer, job)?;
        let tokens: Vec<u16> = tokenizer.tokens(text).collect();
        let train_len = (tokens.len() as f64 * (1.0 - job.validation_fraction)) as usize;
        let targets = job.text.targets;
        let predicted = |len: usize| len.saturating_sub(characters_ahead(targets));
        let windows = |len: usize| predicted(len) / step_len(job);
        let train = Part { start: 0, windows: windows(train_len) };
        let validation = Part { start: train_len, windows: windows(tokens.len() - train_len) };
        if train.windows == 0 {
            return Err(too_short(name, train_len, job));
        }

        let in_windows = |part: Part| (part.windows * step_len(job)) as u64;
        let train_samples = predicted(train_len) as u64;
        let characters = grouped(tokens.len() as u64);
        let classes = tokenizer.vocabulary().len();
        let facts = DataFacts {
            name: format!("{name}, {characters} characters, {classes} distinct"),
            digest: sha256_hex([bytes]),
            labels: None,
            vocabulary: Some(tokenizer.vocabulary().to_vec()),
            sample_unit: "characters",
            train_samples,
            skipped_per_epoch: train_samples - in_windows(train),
            validation_samples: in_windows(validation),
        };
        let shape = DataShape {
            model: ModelShape { reset_token, ..ModelShape::of(job, classes, classes) },
            seq_len: job.seq_len as usize,
            schedule: schedule(run, train.windows as u64, validation.windows as u64),
        };
        let cut = BatchCut::new(job);
        Ok(Self(Arc::new(Shared { shape, facts, cut, targets, tokens, train, validation })))
    }
}

impl Dataset for TextDataset {
    fn shape(&self) -> &DataShape {
        &self.0.shape
    }

    fn batch(&mut self, work: Work, shards: Range<u32>) -> Batch {
        let Shared { shape, cut, targets, tokens, train, validation, .. } = &*self.0;
        let (part, index) = match work {
            Work::Train { index, .. } => (train, index as usize),
            Work::Evaluate { index, .. } => (validation, index as usize),
        };
        assert!(index < part.windows, "{work:?}: the text has {} windows", part.windows);
        let seq_len = shape.seq_len;
        let slots = cut.slots_of(shards.clone());
        let start_of = |slot: u32| part.start + (slot as usize * part.windows + index) * seq_len;
        let starts: Vec<usize> = slots.clone().map(start_of).collect();
        // A step's inputs, then the target of the last of them.
        let row = |&start: &usize| {
            let end = start + seq_len;
            let last = match targets {
                Targets::Shift => end,
                Targets::Wrap => start,
            };
            tokens[start..end].iter().chain(&tokens[last..=last])
        };
        Batch {
            work,
            first_slot: slots.start,
            shards: shard_batches(*cut, shards, cut.batch_size),
            sample_ids: starts.iter().map(|&start| start as u64).collect(),
            lengths: vec![seq_len as u32; starts.len()],
            paddings: vec![0; starts.len()],
            inputs: Inputs::Tokens(starts.iter().flat_map(row).copied().collect()),
        }
    }

    fn facts(&self) -> &DataFacts {
        &self.0.facts
    }

    fn handle(&self) -> Box<dyn Dataset> {
        Box::new(self.clone())
    }
}

fn tokenizer(name: &str, text: &str) -> Result<Tokenizer, Problem> {
    let tokenizer = Tokenizer::new(name, text.chars())?;
    match tokenizer.vocabulary() {
        [] => Err(Problem::usage(format!("{name} is empty"))),
        [only] => Err(Problem::usage(format!(
            "{name} holds no character but {only:?}: there is nothing to predict"
        ))),
        _ => Ok(tokenizer),
    }
}

/// The token of the character before which the state starts anew.
fn reset_token(name: &str, tokenizer: &Tokenizer, job: &JobSpec) -> Result<Option<u16>, Problem> {
    let Some(character) = job.text.reset_at.chars().next() else { return Ok(None) };
    match tokenizer.token(character) {
        Some(token) => Ok(Some(token)),
        None => {
            Err(Problem::usage(format!("text.reset_at is {character:?}, but {name} has no such character"))
                .hint(format!("it has {}", Vocabulary::new(tokenizer.vocabulary().iter().copied()))))
        }
    }
}

/// Characters behind a row that its targets need.
fn characters_ahead(targets: Targets) -> usize {
    match targets {
        Targets::Shift => 1,
        Targets::Wrap => 0,
    }
}

/// Characters that one step predicts, `B·T`.
fn step_len(job: &JobSpec) -> usize {
    job.batch_size as usize * job.seq_len as usize
}

fn too_short(name: &str, train_len: usize, job: &JobSpec) -> Problem {
    Problem::usage(format!(
        "the training part of {name} has {} characters, one step of batch_size {} and seq_len {} reads {}",
        grouped(train_len as u64),
        job.batch_size,
        job.seq_len,
        grouped((step_len(job) + characters_ahead(job.text.targets)) as u64)
    ))
    .hint("choose a smaller batch_size or seq_len, or give a longer text")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{job, job_with, real_data, refusal, run};
    use super::*;
    use protocol::layout::Input;

    /// A data set of `text` whose validation part is its last tenth.
    fn open(text: &str, batch_size: u32, seq_len: u32, shards: u32) -> Result<TextDataset, Problem> {
        let job = job("char-gru", &[("batch_size", batch_size), ("seq_len", seq_len), ("shards", shards)]);
        TextDataset::new("text", text.as_bytes(), &job, &run("embedded"))
    }

    /// Numbers written in the letters a, b, c, ... so that token i is number i.
    fn letters(len: u32) -> String {
        (0..len).map(|i| char::from_u32(0x4e00 + i).unwrap()).collect()
    }

    fn tokens(batch: &Batch) -> &[u16] {
        let Inputs::Tokens(tokens) = &batch.inputs else { panic!("a text gives tokens") };
        tokens
    }

    fn train(index: u64) -> Work {
        Work::Train { step: index, epoch: 0, index }
    }

    /// The function `char_batches` of the NumPy reference, element by element: window `n` of row `b` of the ids cut
    /// to `[batch][windows][steps]`, and the ids one further as targets.
    fn char_batches(ids: &[u16], batch: usize, steps: usize) -> Vec<Vec<(Vec<u16>, Vec<u16>)>> {
        let windows = (ids.len() - 1) / (batch * steps);
        let cut = |from: &[u16], n: usize, b: usize| {
            let start = (b * windows + n) * steps;
            from[start..start + steps].to_vec()
        };
        (0..windows).map(|n| (0..batch).map(|b| (cut(ids, n, b), cut(&ids[1..], n, b))).collect()).collect()
    }

    #[test]
    fn the_worked_example_of_get_batches() {
        // The numbers 1..12 as two sequences read three at a time; the 13th is the last one's target. With a tenth
        // held out, 15 characters leave 13 to train on.
        let mut data = open(&letters(15), 2, 3, 2).unwrap();
        assert_eq!(data.shape().schedule.steps_per_epoch, 2);
        let first = data.batch(train(0), 0..2);
        assert_eq!(tokens(&first), [0, 1, 2, 3, /* row 1 */ 6, 7, 8, 9]);
        assert_eq!(first.sample_ids, [0, 6]);
        let second = data.batch(train(1), 0..2);
        assert_eq!(tokens(&second), [3, 4, 5, 6, /* row 1 */ 9, 10, 11, 12]);
        assert_eq!(second.sample_ids, [3, 9]);
    }

    /// [`open`] with more settings.
    fn open_with(text: &str, settings: &[(&str, &str)]) -> Result<TextDataset, Problem> {
        let sizes = [("batch_size", "2"), ("seq_len", "3"), ("shards", "2")];
        let job = job_with("char-gru", &[&sizes, settings].concat());
        TextDataset::new("text", text.as_bytes(), &job, &run("embedded"))
    }

    #[test]
    fn the_worked_example_of_get_batches_with_wrapped_targets() {
        // Without a 13th number: the last target of a window is the first of its own row.
        let text = letters(14);
        let mut data = open_with(&text, &[("targets", "wrap")]).unwrap();
        assert_eq!(data.shape().schedule.steps_per_epoch, 2);
        assert_eq!((data.facts().train_samples, data.facts().skipped_per_epoch), (12, 0));
        let first = data.batch(train(0), 0..2);
        assert_eq!(tokens(&first), [0, 1, 2, 0, /* row 1 */ 6, 7, 8, 6]);
        let second = data.batch(train(1), 0..2);
        assert_eq!(tokens(&second), [3, 4, 5, 3, /* row 1 */ 9, 10, 11, 9]);
        assert_eq!((first.sample_ids, second.sample_ids), (vec![0, 6], vec![3, 9]));

        let (sentence, _) = refusal(open_with(&letters(6), &[("targets", "wrap")]));
        assert_eq!(
            sentence,
            "the training part of text has 5 characters, one step of batch_size 2 and seq_len 3 reads 6"
        );
    }

    #[test]
    fn the_state_starts_anew_before_a_character_of_the_text() {
        let reset = |character| {
            open_with("one two\nthree four\n", &[("reset_at", character)])
                .map(|data| data.shape().model.reset_token)
        };
        assert_eq!(reset("\"\""), Ok(None));
        assert_eq!(reset("\n"), Ok(Some(0)));
        assert_eq!(reset("t"), Ok(Some(8)));
        assert_eq!(
            refusal(reset("x")),
            (
                "text.reset_at is 'x', but text has no such character".into(),
                r"it has '\n' ' ' 'e' 'f' 'h' 'n' 'o' 'r' 't' 'u' 'w'".into()
            )
        );
    }

    #[test]
    fn any_split_into_shards_gives_the_rows_of_char_batches() {
        let text: String = letters(1009).chars().cycle().step_by(7).take(3001).collect();
        for (batch_size, seq_len, shards) in [(7, 5, 3), (12, 10, 12), (33, 1, 8), (1, 150, 1), (5, 33, 2)] {
            let mut data = open(&text, batch_size, seq_len, shards).unwrap();
            let ids = &data.0.tokens.clone();
            let train_len = 2700;
            let reference = char_batches(&ids[..train_len], batch_size as usize, seq_len as usize);
            assert_eq!(data.shape().schedule.steps_per_epoch, reference.len() as u64);
            let validation = char_batches(&ids[train_len..], batch_size as usize, seq_len as usize);
            assert_eq!(data.shape().schedule.evaluation_batches, validation.len() as u64);

            let works = (0..reference.len() as u64).map(train);
            let evaluations = (0..validation.len() as u64).map(|index| Work::Evaluate { step: 9, index });
            for (work, rows) in works.chain(evaluations).zip(reference.iter().chain(&validation)) {
                let expected: Vec<u16> = rows
                    .iter()
                    .flat_map(|(inputs, targets)| {
                        assert_eq!(inputs[1..], targets[..targets.len() - 1]);
                        inputs.iter().copied().chain(targets.last().copied())
                    })
                    .collect();
                for cut in 0..=shards {
                    let parts: Vec<Batch> = [0..cut, cut..shards]
                        .into_iter()
                        .filter(|range| !range.is_empty())
                        .map(|range| data.batch(work, range))
                        .collect();
                    let joined: Vec<u16> = parts.iter().flat_map(|part| tokens(part).to_vec()).collect();
                    assert_eq!(joined, expected, "B {batch_size} T {seq_len} S {shards} cut {cut} {work:?}");
                    let mut slot = 0;
                    for part in &parts {
                        assert_eq!(part.first_slot, slot);
                        slot += part.rows() as u32;
                        assert_eq!(part.shards.last().unwrap().rows.end, part.rows());
                    }
                    assert_eq!(slot, batch_size);
                }
            }
        }
    }

    #[test]
    fn a_row_goes_on_where_the_step_before_ended() {
        let mut data = open(&letters(2000), 4, 9, 4).unwrap();
        let mut before = data.batch(train(0), 0..4).sample_ids;
        for index in 1..data.shape().schedule.steps_per_epoch {
            let now = data.batch(train(index), 0..4).sample_ids;
            assert_eq!(now, before.iter().map(|id| id + 9).collect::<Vec<_>>());
            before = now;
        }
    }

    #[test]
    fn a_validation_part_too_short_for_a_step_is_no_evaluation() {
        let data = open(&letters(90), 4, 5, 2).unwrap();
        assert_eq!(data.shape().schedule.evaluation_batches, 0);
        let facts = data.facts();
        assert_eq!((facts.train_samples, facts.skipped_per_epoch, facts.validation_samples), (80, 0, 0));
        assert_eq!(open(&letters(210), 4, 5, 2).unwrap().facts().validation_samples, 20);
        assert_eq!(open(&letters(205), 4, 5, 2).unwrap().facts().skipped_per_epoch, 3);
    }

    #[test]
    fn the_vocabulary_is_sorted_and_counts_characters_not_bytes() {
        let data = open("zebra äöü zebra äöü zebra äöü", 1, 2, 1).unwrap();
        let vocabulary: String = data.facts().vocabulary.as_ref().unwrap().iter().collect();
        assert_eq!(vocabulary, " aberzäöü");
        assert_eq!(data.facts().name, "text, 29 characters, 9 distinct");
        assert_eq!(data.shape().model.input, Input::OneHot(9));
    }

    #[test]
    fn unusable_texts_are_refused_in_words() {
        let too_many: String = ('\u{1_0000}'..).take(65_536).collect();
        let cases = [
            ("", "text is empty"),
            ("aaaa", "text holds no character but 'a': there is nothing to predict"),
            (&too_many, "text holds 65536 distinct characters, the most supported is 65535"),
            (
                "abcabcabcabc",
                "the training part of text has 10 characters, one step of batch_size 3 and seq_len 4 reads 13",
            ),
        ];
        for (text, sentence) in cases {
            assert_eq!(refusal(open(text, 3, 4, 1)).0, sentence);
        }
        let (_, hint) = refusal(open("abc", 3, 4, 1));
        assert_eq!(hint, "choose a smaller batch_size or seq_len, or give a longer text");
        assert!(open(&too_many[4..], 3, 4, 1).is_ok(), "65,535 are supported");

        let (sentence, _) = refusal(TextDataset::new("x.txt", b"\xff", &job("char-gru", &[]), &run("x.txt")));
        assert_eq!(sentence, "x.txt is not UTF-8: byte 0xff at offset 0");
    }

    #[test]
    fn the_embedded_text_is_the_frozen_one() {
        let digest = sha256_hex([EMBEDDED_TEXT.as_bytes()]);
        assert_eq!(digest, EMBEDDED_TEXT_SHA256, "renew it with scripts/renew-embedded-text only");
        let distinct = tokenizer("embedded text", EMBEDDED_TEXT).unwrap().vocabulary().len();
        let characters = EMBEDDED_TEXT.chars().count();
        assert!(distinct <= 100 && characters <= 460_000, "{distinct} {characters}");
    }

    #[test]
    fn tinyshakespeare_is_cut_as_the_reference_cuts_it() {
        let Some(places) = real_data() else { return };
        let job = job("char-lstm", &[]);
        let mut data = super::super::open_in(&job, &run("tinyshakespeare"), &places).unwrap();
        let facts = data.facts();
        assert_eq!(facts.name, "tinyshakespeare, 1,115,394 characters, 65 distinct");
        assert_eq!((facts.train_samples, facts.skipped_per_epoch), (1_003_853, 2253));
        let schedule = data.shape().schedule;
        assert_eq!((schedule.steps_per_epoch, schedule.evaluation_batches), (313, 34));
        let vocabulary = facts.vocabulary.clone().unwrap();
        let batch = data.batch(train(0), 0..8);
        let row: String = tokens(&batch)[..51].iter().map(|&token| vocabulary[usize::from(token)]).collect();
        assert_eq!(row, "First Citizen:\nBefore we proceed any further, hear ");
    }
}
