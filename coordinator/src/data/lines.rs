//! Task `chars` with `text.mode = "lines"`: each line that is not empty is a sequence of its own.
//!
//! A line of n characters has n + 1 steps: the first reads the end of the line before it and predicts c1, the last
//! predicts the line's own end. The last lines of the text are held out.

use protocol::job::{JobSpec, Pad};
use protocol::problem::Problem;

use super::sequences::{Row, Sequences, numbered_lines};
use super::tokenizer::{Tokenizer, decode};
use crate::hex::sha256_hex;

/// Reads the lines of `bytes`, which people know as `name`.
///
/// # Errors
/// The text is not UTF-8, has no line with a character in it, too many distinct characters, or the one that the job
/// pads with.
pub(super) fn read(name: &str, bytes: &[u8], job: &JobSpec) -> Result<Sequences, Problem> {
    let lines = numbered_lines(decode(name, bytes)?);
    if lines.clone().next().is_none() {
        return Err(Problem::usage(format!("{name} has no line with a character in it")));
    }
    let texts = lines.clone().map(|(_, text)| text);
    let tokenizer = Tokenizer::of_lines(name, texts, Some('\n'), job.text.pad)?;
    let end_of_line = tokenizer.token('\n').expect("the end of a line is in the vocabulary");
    let rows: Vec<Row> = lines
        .clone()
        .map(|(line, text)| {
            let tokens = [end_of_line].into_iter().chain(tokenizer.tokens(text)).chain([end_of_line]);
            Row { line, tokens: tokens.collect(), label: 0 }
        })
        .collect();
    let train_lines = (rows.len() as f64 * (1.0 - job.validation_fraction)) as u32;
    Ok(Sequences {
        name: name.to_owned(),
        digest: sha256_hex([bytes]),
        vocabulary: tokenizer.vocabulary().to_vec(),
        labels: None,
        // A sample starts each line anew. Padding is read before the end of the line before; its state must stay.
        reset_token: (job.text.pad == Pad::Post).then_some(end_of_line),
        characters: lines.map(|(_, text)| text.chars().count() as u64).sum(),
        train: (0..train_lines).collect(),
        validation: (train_lines..rows.len() as u32).collect(),
        rows,
    })
}

#[cfg(test)]
mod tests {
    use super::super::sequences::SequenceDataset;
    use super::super::testing::{job_with, refusal, run};
    use super::super::{DataFacts, Dataset};
    use super::*;
    use protocol::batch::{Batch, Inputs};
    use protocol::schedule::Work;

    const SIZES: [(&str, &str); 3] = [("mode", "lines"), ("batch_size", "2"), ("shards", "2")];

    fn open(text: &str, settings: &[(&str, &str)]) -> Result<SequenceDataset, Problem> {
        let job = job_with("char-lstm", &[&SIZES, settings].concat());
        SequenceDataset::new(read("text", text.as_bytes(), &job)?, &job, &run("x"))
    }

    /// The rows of a batch as texts, padding as `_`.
    fn texts(facts: &DataFacts, batch: &Batch) -> Vec<String> {
        let Inputs::Tokens(tokens) = &batch.inputs else { panic!("lines give tokens") };
        let vocabulary = facts.vocabulary.as_ref().unwrap();
        let mut rest = &tokens[..];
        let texts = batch.lengths.iter().map(|&length| {
            let (row, after) = rest.split_at(length as usize + 1);
            rest = after;
            row.iter()
                .map(|&token| vocabulary[usize::from(token)])
                .map(|c| if c == '\0' { '_' } else { c })
                .collect()
        });
        texts.collect()
    }

    fn batches(data: &mut SequenceDataset, work: impl Fn(u64) -> Work, count: u64) -> Vec<(u64, String)> {
        let facts = data.facts().clone();
        let mut rows: Vec<(u64, String)> = (0..count)
            .flat_map(|index| {
                let batch = data.batch(work(index), 0..2);
                batch.sample_ids.iter().copied().zip(texts(&facts, &batch)).collect::<Vec<_>>()
            })
            .collect();
        rows.sort();
        rows
    }

    fn trained(data: &mut SequenceDataset) -> Vec<(u64, String)> {
        let count = data.shape().schedule.steps_per_epoch;
        batches(data, |index| Work::Train { step: index, epoch: 0, index }, count)
    }

    #[test]
    fn each_line_is_read_from_the_end_of_the_one_before_to_its_own() {
        let text = "one\r\n\nthree\n\r\nä\nfour\nlast one";
        let mut data = open(text, &[("validation_fraction", "0.2")]).unwrap();
        let expected = [(1, "\none\n"), (3, "\nthree\n"), (5, "\nä\n"), (6, "\nfour\n")];
        assert_eq!(trained(&mut data), expected.map(|(line, text)| (line, text.to_owned())));
        let evaluated = batches(&mut data, |index| Work::Evaluate { step: 2, index }, 1);
        assert_eq!(evaluated, [(7, "\nlast one\n".to_owned())]);

        let (facts, shape) = (data.facts(), data.shape());
        assert_eq!(facts.name, "text, 5 lines, 21 characters, 14 distinct");
        assert_eq!((facts.train_samples, facts.skipped_per_epoch, facts.validation_samples), (4, 0, 1));
        assert_eq!((facts.sample_unit, shape.seq_len, shape.model.reset_token), ("lines", 9, Some(0)));
        assert_eq!((shape.model.classes, shape.model.carries_state), (14, false));
    }

    #[test]
    fn of_long_lines_the_last_steps_are_kept() {
        let text = "one\nthree\nfour\nab\nlast";
        let mut data = open(text, &[("max_len", "4")]).unwrap();
        let expected = [(1, "\none\n"), (2, "hree\n"), (3, "four\n"), (4, "\nab\n")];
        assert_eq!(trained(&mut data), expected.map(|(line, text)| (line, text.to_owned())));
        assert_eq!((data.shape().seq_len, open(text, &[]).unwrap().shape().seq_len), (4, 6));
    }

    #[test]
    fn padding_in_front_makes_rows_of_one_length() {
        let text = "one\nthree\nfour\nab\nlast";
        let mut data = open(text, &[("pad", "pre")]).unwrap();
        let expected = [(1, "__\none\n"), (2, "\nthree\n"), (3, "_\nfour\n"), (4, "___\nab\n")];
        assert_eq!(trained(&mut data), expected.map(|(line, text)| (line, text.to_owned())));
        assert_eq!(data.shape().model.reset_token, None, "padding must reach the line");
        assert_eq!(data.facts().name, "text, 5 lines, 18 characters, 13 distinct");
        assert_eq!((data.facts().vocabulary.as_ref().unwrap()[0], data.shape().model.classes), ('\0', 14));

        let batch = data.batch(Work::Evaluate { step: 0, index: 0 }, 0..2);
        assert_eq!((&batch.lengths[..], &batch.paddings[..]), (&[6][..], &[1][..]));
        assert_eq!(Batch::from_bytes(&batch.to_bytes(), data.shape()), Some(batch));

        let mut wide = open(text, &[("pad", "pre"), ("max_len", "8")]).unwrap();
        assert_eq!(trained(&mut wide)[3].1, "_____\nab\n");
        assert_eq!(wide.shape().seq_len, 8);
    }

    #[test]
    fn unusable_lines_are_refused_in_words() {
        for text in ["", "\n\r\n\n"] {
            assert_eq!(refusal(open(text, &[])).0, "text has no line with a character in it");
        }
        assert_eq!(
            refusal(open("a\0b\nc\nd", &[("pad", "pre")])),
            (
                r"text has '\0', the character that lines are padded with".into(),
                "leave out text.pad, or take the character out of the text".into()
            )
        );
        assert!(open("a\0b\nc\nd", &[]).is_ok());
        assert_eq!(
            refusal(open("a\nb", &[])),
            (
                "the training part of text has 1 lines, one step of batch_size 2 reads 2".into(),
                "choose a smaller batch_size, or give more lines".into()
            )
        );
        let long = format!("a\nb\n\n{}\nc\nd", "e".repeat(65_536));
        assert_eq!(
            refusal(open(&long, &[])),
            (
                "line 4 of text has 65,537 steps, the most supported is 65,536".into(),
                "keep the last steps of long lines with --set text.max_len=STEPS, or break them up".into()
            )
        );
        assert_eq!(open(&long, &[("max_len", "65536")]).unwrap().shape().seq_len, 65_536);
    }
}
