//! The first step at which two runs part, from the numbers that both have recorded of their steps.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::journal::LedgerLine;
use super::metrics_log::{MetricLine, StepLine};

/// What a run has recorded of its steps, by steps done.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepRecords {
    /// Loss, gradient norm and learning rate.
    pub metrics: BTreeMap<u64, StepLine>,
    /// Rows.
    pub ledger: BTreeMap<u64, LedgerLine>,
}

/// How the records of two runs compare.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecordDiff {
    /// The last step that each has recorded.
    pub recorded: [u64; 2],
    /// Steps that both have recorded.
    pub common: u64,
    /// The first of them in which the records differ.
    pub parted: Option<PartedStep>,
}

/// A step with different records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartedStep {
    /// Steps done, this one included.
    pub step: u64,
    /// What differs.
    pub numbers: Vec<Parted>,
}

/// One value in which two runs differ, as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Parted {
    /// What it is.
    pub name: String,
    /// The first run's.
    pub a: String,
    /// The second's.
    pub b: String,
}

impl StepRecords {
    /// The records of a metrics file and a ledger.
    pub fn new(lines: Vec<MetricLine>, ledger: BTreeMap<u64, LedgerLine>) -> Self {
        let step = |line| match line {
            MetricLine::Step(line) => Some((line.step, line)),
            MetricLine::Epoch(_) | MetricLine::Sample(_) => None,
        };
        Self { metrics: lines.into_iter().filter_map(step).collect(), ledger }
    }

    /// The last step that is recorded.
    pub fn last(&self) -> u64 {
        let metrics = self.metrics.last_key_value().map_or(0, |(&step, _)| step);
        self.ledger.last_key_value().map_or(0, |(&step, _)| step).max(metrics)
    }
}

/// Compares every bit of what depends on job and data only. Times and speeds are not compared.
pub fn record_diff(a: &StepRecords, b: &StepRecords) -> RecordDiff {
    // By what is there, not by counting: a damaged line can have any number.
    let in_metrics = a.metrics.keys().filter(|step| b.metrics.contains_key(step));
    let in_ledger = a.ledger.keys().filter(|step| b.ledger.contains_key(step));
    let common: BTreeSet<u64> = in_metrics.chain(in_ledger).copied().filter(|&step| step > 0).collect();
    let mut diff = RecordDiff { recorded: [a.last(), b.last()], common: common.len() as u64, parted: None };
    for step in common {
        let metrics = a.metrics.get(&step).zip(b.metrics.get(&step));
        let ledger = a.ledger.get(&step).zip(b.ledger.get(&step));
        let mut numbers = Vec::new();
        let mut compare = |name: &str, is_equal: bool, [a, b]: [String; 2]| {
            if !is_equal {
                numbers.push(Parted { name: name.to_owned(), a, b });
            }
        };
        if let Some((a, b)) = metrics {
            for (name, a, b) in [
                ("train_loss", a.train_loss, b.train_loss),
                ("grad_norm", a.grad_norm, b.grad_norm),
                ("learning_rate", a.learning_rate, b.learning_rate),
            ] {
                compare(name, a.to_bits() == b.to_bits(), [a, b].map(number));
            }
        }
        if let Some((a, b)) = ledger {
            compare("rows", a.rows == b.rows, [a, b].map(|line| line.rows.to_string()));
            compare(
                "row_hash",
                a.row_hash == b.row_hash,
                [a, b].map(|line| format!("{:016x}", line.row_hash)),
            );
        }
        if diff.parted.is_none() && !numbers.is_empty() {
            diff.parted = Some(PartedStep { step, numbers });
        }
    }
    diff
}

/// A number with its bits: `0.5 (0x3fe0000000000000)`.
pub(super) fn number(value: f64) -> String {
    format!("{value:?} ({:#018x})", value.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::metrics_log::SecondsLine;

    fn records(steps: std::ops::RangeInclusive<u64>) -> StepRecords {
        let line = |step: u64| {
            let seconds = SecondsLine { data: step as f64, ..SecondsLine::default() };
            MetricLine::Step(StepLine {
                step,
                epoch: 1,
                train_loss: 1.0 / step as f64,
                grad_norm: 0.1 + step as f64,
                learning_rate: 0.001,
                samples_per_second: 10.0,
                workers: 1,
                skipped: false,
                seconds,
            })
        };
        let ledger = steps.clone().map(|step| (step, LedgerLine { rows: 64, row_hash: step << 40 }));
        StepRecords::new(steps.clone().map(line).collect(), ledger.collect())
    }

    #[test]
    fn equal_records_are_equal_as_far_as_both_go() {
        let diff = record_diff(&records(1..=9), &records(1..=5));
        assert_eq!(diff, RecordDiff { recorded: [9, 5], common: 5, parted: None });
    }

    #[test]
    fn the_times_of_a_step_do_not_count() {
        let mut other = records(1..=5);
        let line = other.metrics.get_mut(&2).unwrap();
        (line.samples_per_second, line.workers, line.seconds.compute) = (99.0, 7, 3.0);
        assert_eq!(record_diff(&records(1..=5), &other).parted, None);
    }

    #[test]
    fn the_first_step_with_another_bit_is_named() {
        type Change = fn(&mut StepRecords, u64);
        fn next(value: f64) -> f64 {
            f64::from_bits(value.to_bits() + 1)
        }
        let cases: [(Change, &str); 5] = [
            (
                |all, step| all.metrics.get_mut(&step).unwrap().train_loss = next(1.0 / step as f64),
                "train_loss",
            ),
            (|all, step| all.metrics.get_mut(&step).unwrap().grad_norm = f64::NAN, "grad_norm"),
            (|all, step| all.metrics.get_mut(&step).unwrap().learning_rate = 0.002, "learning_rate"),
            (|all, step| all.ledger.get_mut(&step).unwrap().rows -= 1, "rows"),
            (|all, step| all.ledger.get_mut(&step).unwrap().row_hash ^= 1, "row_hash"),
        ];
        for (change, name) in cases {
            let mut other = records(1..=9);
            for step in [4, 7] {
                change(&mut other, step);
            }
            let diff = record_diff(&records(1..=9), &other);
            let parted = diff.parted.unwrap();
            assert_eq!((parted.step, parted.numbers.len(), diff.common), (4, 1, 9));
            assert_eq!(parted.numbers[0].name, name);
            assert_ne!(parted.numbers[0].a, parted.numbers[0].b);
        }
    }

    #[test]
    fn what_only_one_has_recorded_is_not_compared() {
        let mut other = records(1..=9);
        other.metrics.clear();
        assert_eq!(
            record_diff(&records(3..=9), &other),
            RecordDiff { recorded: [9, 9], common: 7, parted: None }
        );
    }

    #[test]
    fn a_huge_number_of_a_step_is_one_step() {
        let [mut a, mut b] = [records(1..=3), records(1..=3)];
        for all in [&mut a, &mut b] {
            all.ledger.insert(u64::MAX, LedgerLine { rows: 1, row_hash: 1 });
        }
        let recorded = [u64::MAX; 2];
        assert_eq!(record_diff(&a, &b), RecordDiff { recorded, common: 4, parted: None });
    }
}
