//! Task `classify`: each line that is not empty is a label, a tab and a text.
//!
//! The labels, sorted, are the classes. A text has a step for each character. Lines are held out one by one, evenly
//! spread over the lines of each label: labelled files are often sorted, or labels take turns.

use protocol::job::JobSpec;
use protocol::problem::Problem;

use super::sequences::{Row, Sequences, numbered_lines};
use super::tokenizer::{MOST_DISTINCT, Tokenizer, decode};
use crate::hex::sha256_hex;

/// A line's number, its label and its text.
type Labelled<'a> = (u64, &'a str, &'a str);

/// Reads the labelled lines of `bytes`, which people know as `name`.
///
/// # Errors
/// The file is not UTF-8, a line lacks its tab, label or text, there are fewer than two labels or too many, too many
/// distinct characters, or the one that the job pads with.
pub(super) fn read(name: &str, bytes: &[u8], job: &JobSpec) -> Result<Sequences, Problem> {
    let lines = numbered_lines(decode(name, bytes)?)
        .map(|(line, text)| labelled(name, line, text))
        .collect::<Result<Vec<Labelled<'_>>, _>>()?;
    let classes = classes(name, &lines)?;
    let texts = lines.iter().map(|&(_, _, text)| text);
    let tokenizer = Tokenizer::of_lines(name, texts.clone(), None, job.text.pad)?;
    let row = |&(line, label, text): &Labelled<'_>| {
        let class = classes.binary_search(&label).expect("every label is a class");
        Row { line, tokens: tokenizer.tokens(text).collect(), label: class as u16 }
    };
    let rows: Vec<Row> = lines.iter().map(row).collect();
    let (validation, train) = split(&rows, job.validation_fraction);
    Ok(Sequences {
        name: name.to_owned(),
        digest: sha256_hex([bytes]),
        vocabulary: tokenizer.vocabulary().to_vec(),
        labels: Some(classes.iter().map(|&label| label.to_owned()).collect()),
        reset_token: None,
        characters: texts.map(|text| text.chars().count() as u64).sum(),
        rows,
        train,
        validation,
    })
}

fn labelled<'a>(name: &str, line: u64, text: &'a str) -> Result<Labelled<'a>, Problem> {
    let refuse = |what: &str| {
        Err(Problem::usage(format!("line {line} of {name} has no {what}"))
            .hint("task \"classify\" reads lines of a label, a tab and a text"))
    };
    match text.split_once('\t') {
        None => refuse("tab between a label and a text"),
        Some(("", _)) => refuse("label before its tab"),
        Some((_, "")) => refuse("text behind its tab"),
        Some((label, text)) => Ok((line, label, text)),
    }
}

/// The distinct labels, ascending.
fn classes<'a>(name: &str, lines: &[Labelled<'a>]) -> Result<Vec<&'a str>, Problem> {
    let mut labels: Vec<&str> = lines.iter().map(|&(_, label, _)| label).collect();
    labels.sort_unstable();
    labels.dedup();
    match labels[..] {
        [] => Err(Problem::usage(format!("{name} has no line with a character in it"))),
        [only] => {
            Err(Problem::usage(format!("{name} has no label but '{only}': there is nothing to tell apart")))
        }
        _ if labels.len() > MOST_DISTINCT => Err(Problem::usage(format!(
            "{name} has {} labels, the most supported is {MOST_DISTINCT}",
            labels.len()
        ))),
        _ => Ok(labels),
    }
}

/// The rows that are held out, and the others: evenly spread over the rows sorted by class, each in the order of the file.
fn split(rows: &[Row], fraction: f64) -> (Vec<u32>, Vec<u32>) {
    let mut by_class: Vec<u32> = (0..rows.len() as u32).collect();
    by_class.sort_by_key(|&row| rows[row as usize].label);
    let places = (0..).zip(by_class);
    let (held_out, others): (Vec<_>, Vec<_>) = places.partition(|&(place, _)| is_held_out(place, fraction));
    let in_order = |places: Vec<(u32, u32)>| {
        let mut rows: Vec<u32> = places.into_iter().map(|(_, row)| row).collect();
        rows.sort_unstable();
        rows
    };
    (in_order(held_out), in_order(others))
}

/// Whether a row, counted from 0, is held out: of the first n rows ⌊n · fraction⌋ are.
fn is_held_out(line: u32, fraction: f64) -> bool {
    // One product each, which every machine rounds alike.
    let held_out = |lines: f64| (lines * fraction).floor();
    held_out(f64::from(line) + 1.0) > held_out(f64::from(line))
}

#[cfg(test)]
mod tests {
    use super::super::Dataset;
    use super::super::sequences::SequenceDataset;
    use super::super::testing::{job_with, refusal, run};
    use super::*;
    use protocol::batch::{Batch, Inputs};
    use protocol::layout::{Head, Input};
    use protocol::schedule::Work;

    fn open(text: &str, settings: &[(&str, &str)]) -> Result<SequenceDataset, Problem> {
        let sizes = [("task", "classify"), ("batch_size", "2"), ("shards", "2")];
        let job = job_with("char-lstm", &[&sizes, settings].concat());
        SequenceDataset::new(read("text", text.as_bytes(), &job)?, &job, &run("x"))
    }

    const FRUIT: &str = "pear\tab\napple\tbc\r\n\npear\tdef\nfig\ta\tb\nfig\tc";

    #[test]
    fn labels_are_classes_and_texts_are_tokens() {
        let mut data = open(FRUIT, &[("validation_fraction", "0.2"), ("embedding_size", "3")]).unwrap();
        let (facts, model) = (data.facts(), data.shape().model.clone());
        assert_eq!(facts.vocabulary.as_ref().unwrap().iter().collect::<String>(), "\tabcdef");
        assert_eq!(facts.name, "text, 5 lines, 11 characters, 7 distinct");
        assert_eq!((facts.train_samples, facts.skipped_per_epoch, facts.validation_samples), (4, 0, 1));
        assert_eq!((model.classes, model.head, model.reset_token), (3, Head::Final, None));
        assert_eq!((model.input, data.shape().seq_len), (Input::Embedding { tokens: 7, size: 3 }, 3));

        let batch = data.batch(Work::Evaluate { step: 0, index: 0 }, 0..2);
        assert_eq!((&batch.sample_ids[..], &batch.lengths[..]), (&[4][..], &[3][..]));
        assert_eq!(batch.inputs, Inputs::LabelledTokens { tokens: vec![4, 5, 6], labels: vec![2] });
        assert_eq!(data.facts().labels.as_ref().unwrap()[..], ["apple", "fig", "pear"]);
        let mut rows = Vec::new();
        for index in 0..2 {
            let batch = data.batch(Work::Train { step: index, epoch: 0, index }, 0..2);
            assert_eq!(Batch::from_bytes(&batch.to_bytes(), data.shape()).as_ref(), Some(&batch));
            let Inputs::LabelledTokens { tokens, labels } = &batch.inputs else { panic!() };
            let mut rest = &tokens[..];
            for ((&line, &length), &label) in batch.sample_ids.iter().zip(&batch.lengths).zip(labels) {
                let (row, after) = rest.split_at(length as usize);
                rows.push((line, label, row.to_vec()));
                rest = after;
            }
        }
        rows.sort();
        let expected = [(1, 2, vec![1, 2]), (2, 0, vec![2, 3]), (5, 1, vec![1, 0, 2]), (6, 1, vec![3])];
        assert_eq!(rows, expected);
    }

    #[test]
    fn texts_are_padded_in_front_and_cut_to_their_last_characters() {
        let settings = [("validation_fraction", "0.2"), ("pad", "pre"), ("max_len", "2")];
        let mut data = open(FRUIT, &settings).unwrap();
        let batch = data.batch(Work::Evaluate { step: 0, index: 0 }, 0..2);
        assert_eq!((&batch.lengths[..], &batch.paddings[..]), (&[2][..], &[0][..]));
        assert_eq!(batch.inputs, Inputs::LabelledTokens { tokens: vec![6, 7], labels: vec![2] });
        let rows: Vec<(u64, Vec<u16>)> = (0..2)
            .flat_map(|index| {
                let batch = data.batch(Work::Train { step: index, epoch: 0, index }, 0..2);
                let Inputs::LabelledTokens { tokens, .. } = batch.inputs else { panic!() };
                let rows: Vec<Vec<u16>> = tokens.chunks_exact(2).map(<[u16]>::to_vec).collect();
                batch.sample_ids.into_iter().zip(rows).collect::<Vec<_>>()
            })
            .collect();
        assert!(rows.contains(&(6, vec![0, 4])) && rows.contains(&(5, vec![1, 3])), "{rows:?}");
    }

    #[test]
    fn held_out_lines_are_as_many_as_asked_for_and_evenly_spread() {
        let lines = |fraction, count| -> Vec<u32> {
            (0..count).filter(|&line| is_held_out(line, fraction)).collect()
        };
        assert_eq!(lines(0.1, 40), [9, 19, 29, 39]);
        assert_eq!(lines(0.4, 10), [2, 4, 7, 9]);
        // 0.29 is a little less than 29 of 100: the 29th comes one line later.
        assert_eq!(lines(0.29, 100).len(), 28);
        assert_eq!(lines(0.29, 101).len(), 29);
        for percent in 1..100 {
            let fraction = f64::from(percent) / 100.0;
            let held_out = lines(fraction, 100_000);
            assert_eq!(held_out.len(), (100_000.0 * fraction) as usize, "{fraction}");
            let gaps: Vec<u32> = held_out.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let (least, most) = (gaps.iter().min().unwrap(), gaps.iter().max().unwrap());
            assert!(most - least <= 1, "{fraction}: gaps from {least} to {most}");
        }
    }

    #[test]
    fn every_label_is_held_out_alike_whatever_the_order_of_the_lines() {
        let taking_turns: Vec<u16> = (0..400).map(|line| line % 10).collect();
        let sorted: Vec<u16> = (0..400).map(|line| line / 40).collect();
        for labels in [taking_turns, sorted] {
            let row = |label| Row { line: 1, tokens: Box::new([]), label };
            let (held_out, others) = split(&labels.iter().map(|&label| row(label)).collect::<Vec<_>>(), 0.1);
            assert_eq!((held_out.len(), others.len()), (40, 360));
            for label in 0..10 {
                assert_eq!(held_out.iter().filter(|&&row| labels[row as usize] == label).count(), 4);
            }
        }
    }

    #[test]
    fn unusable_lines_are_refused_in_words() {
        let hint = "task \"classify\" reads lines of a label, a tab and a text";
        let cases = [
            ("", "text has no line with a character in it", ""),
            ("a\tb\n\nc d\n", "line 3 of text has no tab between a label and a text", hint),
            ("a\tb\n\tc\n", "line 2 of text has no label before its tab", hint),
            ("a\tb\nc\t\r\n", "line 2 of text has no text behind its tab", hint),
            ("a\tb\na\tc\n", "text has no label but 'a': there is nothing to tell apart", ""),
            (
                "a\tb\nc\td\n",
                "the training part of text has 2 lines, one step of batch_size 3 reads 3",
                "choose a smaller batch_size, or give more lines",
            ),
        ];
        for (text, sentence, hint) in cases {
            assert_eq!(
                refusal(open(text, &[("batch_size", "3")])),
                (sentence.to_owned(), hint.to_owned()),
                "{text:?}"
            );
        }
        let many = |labels: u32| (0..labels).map(|label| format!("{label}\tx\n")).collect::<String>();
        assert_eq!(refusal(open(&many(65_536), &[])).0, "text has 65536 labels, the most supported is 65535");
        assert_eq!(open(&many(65_535), &[]).unwrap().shape().model.classes, 65_535);
        assert_eq!(
            refusal(open("a\t\0\nb\tc\nb\td", &[("pad", "pre")])).0,
            r"text has '\0', the character that lines are padded with"
        );
        let job = job_with("char-lstm", &[("task", "classify")]);
        let (sentence, _) = refusal(read("x.tsv", b"a\tb\nc\t\xff", &job));
        assert_eq!(sentence, "x.tsv is not UTF-8: byte 0xff at offset 6");
    }
}
