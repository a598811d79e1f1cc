//! What a run looks like as text. Pure: values and a width in, lines out.

use protocol::job::Task;
use protocol::sums::StepSums;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::{EpochEnd, Progress};
use crate::data::grouped;

/// However narrow the terminal is, a value of the table has this many columns.
const VALUE_WIDTH_MIN: usize = 16;

/// The bar itself has at least this many columns; what is written beside it is dropped before.
const BAR_WIDTH_MIN: usize = 8;

/// A box with a title and rows of key and value. Values are wrapped so that it has at most `width` columns.
pub(super) fn table(title: &str, rows: &[(&str, String)], width: Option<usize>) -> Vec<String> {
    let title = format!(" {title} ");
    let key_width = rows.iter().map(|(key, _)| key.width()).max().unwrap_or(0);
    let frame = key_width + 7;
    let most = width.map_or(usize::MAX, |width| width.saturating_sub(frame).max(VALUE_WIDTH_MIN));
    let values: Vec<Vec<String>> =
        rows.iter().map(|(_, value)| wrapped(value.split(' '), " ", most)).collect();
    let widest = values.iter().flatten().map(|line| line.width()).max().unwrap_or(0);
    let value_width = widest.max((title.width() + 4).saturating_sub(frame));
    let inner = value_width + frame - 2;
    let mut lines = vec![format!("╭─{title}{}╮", "─".repeat(inner - 1 - title.width()))];
    for ((key, _), value) in rows.iter().zip(values) {
        for (line, key) in value.iter().zip(std::iter::once(*key).chain(std::iter::repeat(""))) {
            lines.push(format!("│ {}   {} │", padded(key, key_width), padded(line, value_width)));
        }
    }
    lines.push(format!("╰{}╯", "─".repeat(inner)));
    lines
}

/// What stands beside the bar on a terminal of this width: as much as leaves room for the bar, the important first.
pub(super) fn beside_bar(progress: &Progress, width: usize) -> String {
    let Progress { step, total_steps, epoch, loss, samples_per_second, seconds_left } = *progress;
    // As wide as it will ever be, so that nothing jumps.
    let digits = total_steps.to_string().len();
    let mut fields = vec![format!("{step:>digits$}/{total_steps}"), format!("epoch {epoch}")];
    fields.push(format!("loss {}", fixed(loss, 4)));
    fields.push(speed(samples_per_second));
    fields.push(left(seconds_left));
    // Positions in what is left, one after another: the speed, the epoch, the time left, the loss.
    for dropped in [3, 1, 2, 1] {
        let text = fields.join("  ");
        if text.width() + 1 + BAR_WIDTH_MIN <= width {
            break;
        }
        fields.remove(dropped);
    }
    fields.join("  ")
}

/// Progress where there is no terminal.
pub(super) fn progress_line(progress: &Progress) -> String {
    let Progress { step, total_steps, epoch, loss, samples_per_second, seconds_left } = *progress;
    let (loss, speed, left) = (fixed(loss, 4), speed(samples_per_second), left(seconds_left));
    format!("epoch {epoch:>3}  step {step:>6}/{total_steps}  loss {loss}  {speed}  {left}")
}

/// The numbers of an epoch, or of a run that ended within one; wrapped where there is a width.
pub(super) fn epoch_lines(
    task: Task,
    steps_per_epoch: u64,
    end: &EpochEnd<'_>,
    width: Option<usize>,
) -> Vec<String> {
    let (epochs, rest) = (end.step / steps_per_epoch, end.step % steps_per_epoch);
    let name = if rest == 0 { format!("epoch {epochs:>3}") } else { format!("step {:>4}", end.step) };
    let indent = name.width() + 2;
    let mut fields =
        vec![name, format!("train {}", end.train_loss.map_or("–".into(), |loss| fixed(loss, 4)))];
    if let Some(sums) = end.validation {
        fields.push(format!("val {}", fixed(sums.mean_loss(), 4)));
        fields.push(quality(task, sums));
    }
    fields.push(format!("grad {}", fixed(end.gradient_norm, 3)));
    fields.push(format!("lr {}", short(end.learning_rate)));
    fields.push(speed(Some(end.samples_per_second)));
    fields.push(format!("comm {:.0} %", 100.0 * end.communication));
    fields.push(format!("{} worker{}", end.workers, if end.workers == 1 { "" } else { "s" }));
    fields.push(duration(end.seconds));
    let most = width.map_or(usize::MAX, |width| width.saturating_sub(indent).max(VALUE_WIDTH_MIN));
    let first = fields.remove(0);
    let lines = wrapped(fields.iter().map(String::as_str), "  ", most);
    let names = std::iter::once(first).chain(std::iter::repeat(String::new()));
    lines.iter().zip(names).map(|(line, name)| format!("{}{line}", padded(&name, indent))).collect()
}

/// The validation loss in the unit that people compare networks by.
pub(crate) fn quality(task: Task, sums: &StepSums) -> String {
    match task {
        Task::Chars => format!("{} bits/char", fixed(sums.mean_loss() / std::f64::consts::LN_2, 3)),
        Task::Rows | Task::Classify => format!("accuracy {:.2} %", 100.0 * sums.accuracy()),
    }
}

/// Outcome, rows of what and where, and the commands that come next.
pub(super) fn summary(outcome: &str, rows: &[(&str, String)], next: &[String]) -> Vec<String> {
    let mut lines = vec![outcome.to_owned()];
    let labels = rows.iter().map(|(key, value)| (*key, value.as_str()));
    let commands = next.iter().map(String::as_str).zip(std::iter::once("next").chain(std::iter::repeat("")));
    let rows: Vec<(&str, &str)> = labels.chain(commands.map(|(command, label)| (label, command))).collect();
    let width = rows.iter().map(|(key, _)| key.width()).max().unwrap_or(0);
    lines.extend(rows.into_iter().map(|(key, value)| format!("  {}  {value}", padded(key, width))));
    lines
}

/// Seconds for people: `0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

/// A number with so many decimals, or in powers of ten where these would show nothing or a long row of digits.
pub(crate) fn fixed(value: f64, decimals: usize) -> String {
    let smallest = 0.5 * 10_f64.powi(-(decimals as i32));
    match value.abs() {
        _ if value.is_nan() => "–".to_owned(),
        size if size == 0.0 || (smallest..1e5).contains(&size) => format!("{value:.decimals$}"),
        f64::INFINITY => format!("{}∞", if value < 0.0 { "-" } else { "" }),
        _ => short(value),
    }
}

/// A number as short as four digits of it can be: `0.001`, `1e10`, `2.5e-6`.
pub(crate) fn short(value: f64) -> String {
    if !value.is_finite() || value == 0.0 {
        return fixed(value, 0);
    }
    let rounded = format!("{value:.3e}");
    let (digits, exponent) = rounded.split_once('e').expect("it is written with an exponent");
    match exponent.parse() {
        Ok(-4..5) => rounded.parse::<f64>().expect("it was just written").to_string(),
        _ => format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.')),
    }
}

/// A word of a command line, in quotes where a shell would take it for something else.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |char: char| char.is_alphanumeric() || "/._-+:@%".contains(char);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn speed(samples_per_second: Option<f64>) -> String {
    match samples_per_second.filter(|speed| speed.is_finite() && *speed > 0.0) {
        Some(speed) if speed < 10.0 => format!("{} samples/s", fixed(speed, 1)),
        Some(speed) => format!("{} samples/s", grouped(speed.round() as u64)),
        None => "– samples/s".to_owned(),
    }
}

fn left(seconds: Option<f64>) -> String {
    format!("{} left", seconds.map_or("–".to_owned(), duration))
}

/// `text` with spaces behind it.
fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(text.width())))
}

/// Words in lines of at most `width` columns; a word that is longer is cut. At least one line.
fn wrapped<'a>(words: impl Iterator<Item = &'a str>, separator: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for (number, word) in words.enumerate() {
        let mut line = lines.pop().expect("there is always a line");
        let begins = number == 0;
        if !begins && line.width() + separator.width() + word.width() > width && !line.is_empty() {
            lines.push(std::mem::take(&mut line));
        } else if !begins {
            line += separator;
        }
        for char in word.chars() {
            if line.width() + char.width().unwrap_or(0) > width && !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            line.push(char);
        }
        lines.push(line);
    }
    lines
}

/// What a network wrote, as lines that no terminal obeys, of at most `width` columns where that is known.
pub(super) fn sample_lines(text: &str, width: Option<usize>) -> Vec<String> {
    const MARGIN: &str = "  │ ";
    let width = width.map_or(usize::MAX, |width| width.saturating_sub(MARGIN.width()).max(1));
    let harmless = text.replace('\t', "    ").replace(|c: char| c.is_control() && c != '\n', "\u{fffd}");
    let lines = harmless.trim_matches('\n').lines().flat_map(|line| wrapped(line.split(' '), " ", width));
    lines.map(|line| format!("{MARGIN}{line}").trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums() -> StepSums {
        StepSums { loss: 200.0, weight: 100, correct: 97, ..StepSums::default() }
    }

    fn end(sums: &StepSums) -> EpochEnd<'_> {
        EpochEnd {
            step: 32,
            train_loss: Some(2.5),
            validation: Some(sums),
            gradient_norm: 0.51249,
            learning_rate: 0.001,
            samples_per_second: 3210.4,
            workers: 2,
            communication: 0.123,
            seconds: 12.3,
        }
    }

    #[test]
    fn durations_read_well() {
        let cases = [
            (0.84, "0.8 s"),
            (12.4, "12 s"),
            (200.0, "3 min 20 s"),
            (7500.0, "2 h 5 min"),
            (200_000.0, "2 d 7 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn numbers_of_any_size_are_short() {
        let cases = [
            (0.001, "0.001"),
            (1e10, "1e10"),
            (2.5e-6, "2.5e-6"),
            (0.000_123_456, "0.0001235"),
            (1.0 / 3.0, "0.3333"),
            (0.0, "0"),
            (f64::MAX, "1.798e308"),
            (f64::MIN_POSITIVE, "2.225e-308"),
            (f64::NAN, "–"),
            (f64::NEG_INFINITY, "-∞"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
        let cases =
            [(2.5, "2.5000"), (0.0, "0.0000"), (0.000_04, "4e-5"), (123_456.0, "1.235e5"), (f64::NAN, "–")];
        for (value, text) in cases {
            assert_eq!(fixed(value, 4), text);
        }
    }

    #[test]
    fn an_epoch_is_one_line_and_wraps_only_on_a_terminal() {
        let sums = sums();
        let line = "epoch   2  train 2.5000  val 2.0000  2.885 bits/char  grad 0.512  lr 0.001  3,210 samples/s  \
                    comm 12 %  2 workers  12 s";
        assert_eq!(epoch_lines(Task::Chars, 16, &end(&sums), None), [line]);
        assert_eq!(
            epoch_lines(Task::Rows, 20, &EpochEnd { workers: 1, ..end(&sums) }, Some(80)),
            [
                "step   32  train 2.5000  val 2.0000  accuracy 97.00 %  grad 0.512  lr 0.001",
                "           3,210 samples/s  comm 12 %  1 worker  12 s"
            ]
        );
        let unknown = EpochEnd { train_loss: None, validation: None, learning_rate: 1e-10, ..end(&sums) };
        let [line] = &epoch_lines(Task::Chars, 16, &unknown, None)[..] else { panic!() };
        assert!(line.starts_with("epoch   2  train –  grad 0.512  lr 1e-10  "), "{line}");
    }

    #[test]
    fn the_bar_has_room_at_any_width_and_the_important_stays_longest() {
        let progress = Progress {
            step: 1234,
            total_steps: 17_000,
            epoch: 3,
            loss: 1.2345,
            samples_per_second: Some(1234.0),
            seconds_left: Some(723.0),
        };
        let cases = [
            (200, " 1234/17000  epoch 3  loss 1.2345  1,234 samples/s  12 min 3 s left"),
            (80, " 1234/17000  epoch 3  loss 1.2345  1,234 samples/s  12 min 3 s left"),
            (70, " 1234/17000  epoch 3  loss 1.2345  12 min 3 s left"),
            (50, " 1234/17000  loss 1.2345  12 min 3 s left"),
            (40, " 1234/17000  loss 1.2345"),
            (20, " 1234/17000"),
        ];
        for (width, text) in cases {
            assert_eq!(beside_bar(&progress, width), text, "{width} columns");
            assert!(text.width() + 1 + BAR_WIDTH_MIN <= width);
        }
        let unknown = Progress { samples_per_second: None, seconds_left: None, ..progress };
        assert!(beside_bar(&unknown, 80).ends_with("loss 1.2345  – samples/s  – left"));
    }

    #[test]
    fn the_table_is_a_box_of_the_terminals_width_at_most() {
        let rows = [
            ("data", "a text".to_owned()),
            ("samples", "one two three four five six seven".to_owned()),
            ("run directory", "/a/path/without/any/space/that/is/longer/than/the/line".to_owned()),
            ("nothing", String::new()),
            ("wide", "名前.txt".to_owned()),
        ];
        for width in [None, Some(200), Some(80), Some(60), Some(40)] {
            let lines = table("Lockstep: char-lstm", &rows, width);
            let columns: Vec<usize> = lines.iter().map(|line| line.width()).collect();
            assert!(columns.iter().all(|count| *count == columns[0]), "{lines:#?}");
            assert!(columns[0] <= width.unwrap_or(usize::MAX), "{lines:#?}");
            let text: String =
                lines.iter().flat_map(|line| line.chars()).filter(|char| !"│ ".contains(*char)).collect();
            for (key, value) in &rows {
                let together = format!("{key}{value}").replace(' ', "");
                assert!(width.is_some() || text.contains(&together), "{together} is not in {text}");
            }
        }
        assert_eq!(table("Lockstep: char-lstm", &rows, None).len(), rows.len() + 2);
        assert_eq!(
            table("T", &[("key", "some words to be wrapped".to_owned())], Some(28)),
            [
                "╭─ T ────────────────────╮",
                "│ key   some words to be │",
                "│       wrapped          │",
                "╰────────────────────────╯"
            ]
        );
        let narrow = table("Lockstep: char-lstm", &rows, Some(1));
        assert!(narrow.iter().all(|line| line.width() == "run directory".len() + 7 + VALUE_WIDTH_MIN));
        assert_eq!(table("Lockstep", &[], None), ["╭─ Lockstep ─╮", "╰────────────╯"]);
    }

    #[test]
    fn a_directory_can_be_typed_as_it_is_shown() {
        let cases = [
            ("runs/char-lstm", "runs/char-lstm"),
            ("my runs", "'my runs'"),
            ("it's", "'it'\\''s'"),
            ("", "''"),
        ];
        for (word, shown) in cases {
            assert_eq!(quoted(word), shown);
        }
    }

    #[test]
    fn the_summary_ends_with_what_to_type_next() {
        let rows = [("train loss", "1.5".to_owned()), ("metrics", "runs/a/metrics.jsonl".to_owned())];
        let next = ["lockstep sample runs/a".to_owned(), "lockstep inspect runs/a".to_owned()];
        assert_eq!(
            summary("done: 3 steps", &rows, &next),
            [
                "done: 3 steps",
                "  train loss  1.5",
                "  metrics     runs/a/metrics.jsonl",
                "  next        lockstep sample runs/a",
                "              lockstep inspect runs/a"
            ]
        );
    }

    #[test]
    fn a_sample_cannot_steer_the_terminal() {
        assert_eq!(
            sample_lines("\n\na\tb \n\n\u{1b}[2Jc\r\n", None),
            ["  │ a    b", "  │", "  │ \u{fffd}[2Jc\u{fffd}"]
        );
    }
}
