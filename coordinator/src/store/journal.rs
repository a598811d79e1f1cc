//! The journal: what happened to a run, one record a line, `CRC32 SPACE JSON`, appended and never changed.
//!
//! A crash of the process loses nothing that was appended. A crash of the machine may lose the end: what is left of
//! it is cut off when the journal is opened. Damage before an intact record cannot come from a crash and is a
//! problem. Records that the others depend on wait for the disk, see [`Record::waits_for_disk`]; the others wait in memory
//! while a disk is full.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use protocol::control::EpochSums;
use protocol::message::{Generation, Member};
use protocol::problem::Problem;
use protocol::sums::StepSums;
use serde::{Deserialize, Serialize};

use super::files::{LineFile, LineSync, io_problem};

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A coordinator started.
    Start {
        /// Counts the starts; fences earlier ones.
        coordinator_epoch: u64,
        /// Name of the run, unique.
        run_id: String,
        /// Package version and git revision.
        build: String,
    },
    /// A generation was formed.
    Generation {
        /// Its number, never reused.
        generation: Generation,
        /// Who belongs to it, by rank.
        members: Vec<MemberLine>,
        /// Why it was formed.
        reason: String,
        /// Everything that the bits of its members depend on; `None` in the journals of versions that did not
        /// record it.
        bits: Option<String>,
    },
    /// A step was done: the ledger of which samples it used.
    Step {
        /// Steps done, this one included.
        step: u64,
        /// Rows handed to the kernels.
        rows: u64,
        /// Sum of their hashes.
        #[serde(with = "hex64")]
        row_hash: u64,
    },
    /// The validation data was evaluated.
    Evaluation {
        /// Steps done when it was made.
        step: u64,
        /// Bits of the summed loss in nats, an f64: JSON has no infinity, and its readers may round.
        #[serde(with = "hex64")]
        loss_bits: u64,
        /// Number of valid targets.
        weight: u64,
        /// Targets that the network ranked first.
        correct: u64,
    },
    /// A checkpoint was written and listed.
    Checkpoint {
        /// Steps done in its state.
        step: u64,
        /// Name of its file.
        file: String,
    },
    /// The run goes on from an earlier step; records of later steps no longer count.
    Rewind {
        /// Steps done in the state it goes on from.
        to_step: u64,
    },
    /// The job's learning rate, which may decay, is another one from here on.
    LearningRate {
        /// Steps done.
        step: u64,
        /// In decimal digits that read back as the same f64: readers of JSON may round a number.
        learning_rate: String,
    },
    /// Something to remember, in words.
    Event {
        /// A sentence.
        text: String,
    },
    /// The run ended.
    Finish {
        /// Steps done.
        step: u64,
        /// How, in words.
        outcome: String,
    },
}

/// One member of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberLine {
    /// Its name for people.
    pub name: String,
    /// First shard it holds, and the first one after those.
    pub shards: [u32; 2],
}

impl From<&Member> for MemberLine {
    fn from(member: &Member) -> Self {
        Self { name: member.name.clone(), shards: [member.shards.start, member.shards.end] }
    }
}

impl Record {
    /// The ledger's record of a step.
    pub fn step(step: u64, sums: &StepSums) -> Self {
        Self::Step { step, rows: sums.rows, row_hash: sums.row_hash }
    }

    /// The record of an evaluation.
    pub fn evaluation(step: u64, sums: &StepSums) -> Self {
        let StepSums { loss, weight, correct, .. } = *sums;
        Self::Evaluation { step, loss_bits: loss.to_bits(), weight, correct }
    }

    /// Whether the run may go on only when this record is on the disk. Numbers that must never be used twice are in
    /// such records; a lost step or evaluation is merely done again after a crash of the machine.
    pub fn waits_for_disk(&self) -> bool {
        match self {
            Self::Start { .. } | Self::Generation { .. } | Self::Rewind { .. } | Self::Finish { .. } => true,
            Self::Step { .. }
            | Self::Evaluation { .. }
            | Self::Checkpoint { .. }
            | Self::LearningRate { .. }
            | Self::Event { .. } => false,
        }
    }

    fn to_line(&self) -> String {
        let json = serde_json::to_string(self).expect("plain values can be written as JSON");
        format!("{:08x} {json}", crc32fast::hash(json.as_bytes()))
    }
}

/// 64-bit words as hexadecimal digits: many readers of JSON keep 53 bits of a number.
mod hex64 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(word: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{word:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map_err(D::Error::custom)
    }
}

/// What a journal says when it is read from its first record to its last.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Replay {
    /// Name of the run; `None` before the first start.
    pub run_id: Option<String>,
    /// The last coordinator's; 0 before the first start.
    pub coordinator_epoch: u64,
    /// The last one formed; 0 before the first.
    pub last_generation: Generation,
    /// What its bits depended on; `None` before it and where that was not recorded.
    pub bits: Option<String>,
    /// First and one past the last shard of each of its members, by rank; none once the run has ended.
    pub places: Vec<[u32; 2]>,
    /// What workers of this and older generations hold is not what the run goes on from.
    pub fence: Generation,
    /// What each step used, by steps done. Rewound steps are gone.
    pub ledger: BTreeMap<u64, LedgerLine>,
    /// Each evaluation, by steps done. Rewound ones are gone.
    pub evaluations: BTreeMap<u64, EpochSums>,
    /// Changed learning rates, by steps done when they were. Rewound ones are gone.
    pub learning_rates: BTreeMap<u64, f64>,
    /// What else was to be remembered: steps done, and the words.
    pub events: Vec<(u64, String)>,
    /// Steps done in the last checkpoint. After a rewind the one that was rewound to.
    pub last_checkpoint: Option<u64>,
    /// Steps done and outcome, if nothing was computed after the run's end.
    pub finished: Option<(u64, String)>,
    /// Number of records.
    pub records: u64,
    /// Bytes of the intact records.
    pub intact_bytes: u64,
    /// Bytes after them: what a crash left of records that were being written.
    pub torn_bytes: u64,
}

/// What one step used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct LedgerLine {
    /// Rows handed to the kernels.
    pub rows: u64,
    /// Sum of their hashes.
    #[serde(with = "hex64")]
    pub row_hash: u64,
}

impl Replay {
    /// Reads a journal without changing it. That there is none is an empty one.
    ///
    /// # Errors
    /// The file cannot be read, is damaged before an intact record, or has a record this program does not know.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        match File::open(path) {
            Ok(file) => Self::from_lines(BufReader::new(file), path),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(io_problem("read", path, &error)),
        }
    }

    /// Reads the content of the journal at `path`, whatever bytes it has.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_lines(mut reader: impl BufRead, path: &Path) -> Result<Self, Problem> {
        let mut replay = Self::default();
        let mut line = Vec::new();
        let mut first_damaged = None;
        for number in 1_u64.. {
            line.clear();
            let length =
                reader.read_until(b'\n', &mut line).map_err(|error| io_problem("read", path, &error))? as u64;
            if length == 0 {
                break;
            }
            let Some(json) = intact_json(&line) else {
                first_damaged.get_or_insert(number);
                replay.torn_bytes += length;
                continue;
            };
            if let Some(damaged) = first_damaged {
                return Err(Problem::for_good(format!("line {damaged} of {} is damaged", path.display()))
                    .hint("restore the file from a copy, or give --fresh to start over"));
            }
            let record = serde_json::from_str(json).map_err(|error| {
                Problem::for_good(format!(
                    "line {number} of {} is not a known record: {error}",
                    path.display()
                ))
                .hint("read it with the version of lockstep that wrote it")
            })?;
            replay.take_in(record);
            replay.intact_bytes += length;
        }
        Ok(replay)
    }

    fn take_in(&mut self, record: Record) {
        self.records += 1;
        match record {
            Record::Start { coordinator_epoch, run_id, .. } => {
                self.coordinator_epoch = coordinator_epoch;
                self.run_id = Some(run_id);
            }
            Record::Generation { generation, bits, members, .. } => {
                (self.last_generation, self.bits) = (generation, bits);
                self.places = members.iter().map(|member| member.shards).collect();
            }
            Record::Step { step, rows, row_hash } => {
                self.ledger.insert(step, LedgerLine { rows, row_hash });
                self.finished = None;
            }
            Record::Evaluation { step, loss_bits, weight, correct } => {
                self.evaluations.insert(step, EpochSums { loss: f64::from_bits(loss_bits), weight, correct });
            }
            Record::Checkpoint { step, .. } => self.last_checkpoint = Some(step),
            Record::Rewind { to_step } => {
                self.ledger.retain(|&step, _| step <= to_step);
                self.evaluations.retain(|&step, _| step <= to_step);
                self.learning_rates.retain(|&step, _| step <= to_step);
                self.last_checkpoint = (to_step > 0).then_some(to_step);
                self.finished = None;
                self.fence = self.last_generation;
            }
            Record::LearningRate { step, learning_rate } => {
                self.learning_rates.insert(step, learning_rate.parse().unwrap_or(f64::NAN));
                self.fence = self.last_generation;
            }
            Record::Event { text } => self.events.push((self.last_step(), text)),
            Record::Finish { step, outcome } => {
                self.finished = Some((step, outcome));
                self.places.clear();
            }
        }
    }

    /// Steps done according to the ledger.
    pub fn last_step(&self) -> u64 {
        self.ledger.last_key_value().map_or(0, |(&step, _)| step)
    }

    /// The learning rate of a state after `step` steps, if it was changed until then.
    pub fn learning_rate_at(&self, step: u64) -> Option<f64> {
        self.learning_rates.range(..=step).next_back().map(|(_, &rate)| rate)
    }

    /// The last evaluation of a state that is not after `step`.
    pub fn evaluation_at(&self, step: u64) -> Option<EpochSums> {
        self.evaluations.range(..=step).next_back().map(|(_, &sums)| sums)
    }
}

/// The JSON of a whole line with the right checksum.
fn intact_json(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (checksum, json) = line.split_once(' ')?;
    (checksum == format!("{:08x}", crc32fast::hash(json.as_bytes()))).then_some(json)
}

/// A journal open for appending.
#[derive(Debug)]
pub struct Journal {
    lines: LineFile,
}

impl Journal {
    /// Replays a journal, cuts off what a crash left of its last records, and opens it for appending; creates it if
    /// there is none. Needs the run directory's lock.
    ///
    /// # Errors
    /// Those of [`Replay::read`], and a file that cannot be written.
    pub fn open(path: &Path) -> Result<(Self, Replay), Problem> {
        let replay = Replay::read(path)?;
        let lines = LineFile::open(path, replay.intact_bytes)?;
        Ok((Self { lines }, replay))
    }

    /// Appends a record, and waits for the disk where [`Record::waits_for_disk`] says so.
    ///
    /// # Errors
    /// The file cannot be written, and the record must be; or too much waits for it in memory.
    pub fn append(&mut self, record: &Record) -> Result<(), Problem> {
        self.lines.append(&record.to_line())?;
        if record.waits_for_disk() { self.on_disk().sync() } else { Ok(()) }
    }

    /// Keeps a record in memory, behind those that wait there.
    ///
    /// # Errors
    /// Too much waits already.
    pub fn keep(&mut self, record: &Record) -> Result<(), Problem> {
        self.lines.keep(&record.to_line())
    }

    /// What waits until its records are on the disk.
    pub(crate) fn on_disk(&self) -> LineSync {
        self.lines.on_disk()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn step(step: u64) -> Record {
        Record::step(step, &StepSums { rows: 64, row_hash: u64::MAX - step, ..Default::default() })
    }

    fn evaluation(step: u64, loss: f64) -> Record {
        Record::evaluation(step, &StepSums { loss, weight: 10, correct: 5, ..Default::default() })
    }

    fn start(coordinator_epoch: u64) -> Record {
        Record::Start { coordinator_epoch, run_id: "r1".to_owned(), build: "0.1.0".to_owned() }
    }

    fn story() -> Vec<Record> {
        let member = MemberLine { name: "host:1\nx".to_owned(), shards: [0, 8] };
        vec![
            start(1),
            Record::Generation {
                generation: 1,
                members: vec![member],
                reason: "first".to_owned(),
                bits: None,
            },
            step(1),
            step(2),
            evaluation(2, 0.1 + 0.2),
            Record::Checkpoint { step: 2, file: "step-00000002.safetensors".to_owned() },
            step(3),
            step(4),
            evaluation(4, f64::NAN),
            Record::Finish { step: 4, outcome: "failed: the loss is not finite".to_owned() },
            start(2),
            Record::Rewind { to_step: 2 },
            Record::Event { text: "epochs: 1 there, 2 here".to_owned() },
            Record::Generation {
                generation: 2,
                members: vec![],
                reason: "resume".to_owned(),
                bits: Some("cpu 1".to_owned()),
            },
            step(3),
        ]
    }

    fn written(records: &[Record]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, replay) = Journal::open(&path).unwrap();
        assert_eq!(replay, Replay::default());
        for record in records {
            journal.append(record).unwrap();
        }
        (dir, path)
    }

    #[test]
    fn a_replay_honours_rewinds() {
        let (_dir, path) = written(&story());
        let replay = Replay::read(&path).unwrap();
        assert_eq!(
            (replay.run_id.as_deref(), replay.coordinator_epoch, replay.last_generation),
            (Some("r1"), 2, 2)
        );
        assert_eq!(replay.bits.as_deref(), Some("cpu 1"));
        assert_eq!(replay.ledger.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(replay.ledger[&3], LedgerLine { rows: 64, row_hash: u64::MAX - 3 });
        assert_eq!((replay.last_step(), replay.last_checkpoint, replay.finished), (3, Some(2), None));
        assert_eq!((replay.records, replay.torn_bytes), (15, 0));
        assert_eq!(replay.intact_bytes, fs::metadata(&path).unwrap().len());
        let sums = EpochSums { loss: 0.1 + 0.2, weight: 10, correct: 5 };
        assert_eq!(replay.evaluations, BTreeMap::from([(2, sums)]));
    }

    #[test]
    fn the_last_evaluation_before_a_step_is_found() {
        let (_dir, path) = written(&[evaluation(2, 1.0), evaluation(4, 2.0)]);
        let replay = Replay::read(&path).unwrap();
        let loss = |step| replay.evaluation_at(step).map(|sums| sums.loss);
        assert_eq!(
            [loss(1), loss(2), loss(3), loss(4), loss(9)],
            [None, Some(1.0), Some(1.0), Some(2.0), Some(2.0)]
        );
    }

    #[test]
    fn a_run_that_ended_is_finished_until_it_goes_on() {
        let end = Record::Finish { step: 1, outcome: "done".to_owned() };
        let (_dir, path) = written(&[start(1), step(1), end.clone(), start(2)]);
        assert_eq!(Replay::read(&path).unwrap().finished, Some((1, "done".to_owned())));
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.append(&step(2)).unwrap();
        assert_eq!(Replay::read(&path).unwrap().finished, None);
    }

    #[test]
    fn workers_of_a_run_that_was_cut_off_may_still_be_there() {
        let generation = |generation| Record::Generation {
            generation,
            members: vec![
                MemberLine { name: "a".to_owned(), shards: [0, 5] },
                MemberLine { name: "b".to_owned(), shards: [5, 8] },
            ],
            reason: String::new(),
            bits: None,
        };
        let rate = Record::LearningRate { step: 1, learning_rate: "0.5".to_owned() };
        let finish = Record::Finish { step: 2, outcome: "done".to_owned() };
        let places: &[[u32; 2]] = &[[0, 5], [5, 8]];
        let cases = [
            (vec![generation(4), step(1)], places, 0),
            (vec![generation(4), step(1), start(2)], places, 0),
            (vec![generation(4), step(1), start(2), Record::Rewind { to_step: 0 }, generation(5)], places, 4),
            (vec![generation(4), step(1), rate, generation(5), step(2)], places, 4),
            (vec![generation(4), step(1), step(2), finish], &[], 0),
        ];
        for (records, places, fence) in cases {
            let (_dir, path) = written(&records);
            let replay = Replay::read(&path).unwrap();
            assert_eq!((&replay.places[..], replay.fence), (places, fence), "{records:?}");
        }
    }

    #[test]
    fn a_report_that_came_twice_counts_once() {
        let (_dir, path) = written(&[step(1), step(1), evaluation(1, 1.0), evaluation(1, 1.0)]);
        let replay = Replay::read(&path).unwrap();
        assert_eq!((replay.ledger.len(), replay.evaluations.len(), replay.records), (1, 1, 4));
    }

    #[test]
    fn the_lines_are_as_documented() {
        let (_dir, path) = written(&[step(1), Record::Rewind { to_step: 0 }]);
        assert_eq!(
            fs::read_to_string(path).unwrap(),
            "d552225a {\"kind\":\"step\",\"step\":1,\"rows\":64,\"row_hash\":\"fffffffffffffffe\"}\n\
             92f14c6c {\"kind\":\"rewind\",\"to_step\":0}\n"
        );
    }

    #[test]
    fn a_torn_tail_is_cut_wherever_it_was_torn() {
        let (_dir, path) = written(&story());
        let whole = fs::read(&path).unwrap();
        let before_last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
        for length in before_last..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let (mut journal, replay) = Journal::open(&path).unwrap();
            assert_eq!((replay.records, replay.torn_bytes), (14, (length - before_last) as u64));
            journal.append(&step(3)).unwrap();
            assert!(fs::read(&path).unwrap() == whole, "torn at byte {length}");
        }
    }

    #[test]
    fn zeros_and_noise_that_a_crash_left_at_the_end_are_cut() {
        for tail in [&[0_u8; 5000][..], b"\n\n\n", b"00000000 {}\n", b"\xff\xfe\n\0\n12"] {
            let (_dir, path) = written(&[start(1), step(1)]);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, [&whole, tail].concat()).unwrap();
            assert_eq!(Replay::read(&path).unwrap().torn_bytes, tail.len() as u64, "reading must not cut");
            let (_, replay) = Journal::open(&path).unwrap();
            assert_eq!((replay.records, replay.torn_bytes), (2, tail.len() as u64));
            assert!(fs::read(&path).unwrap() == whole);
        }
    }

    #[test]
    fn damage_before_an_intact_record_is_a_problem_and_nothing_is_cut() {
        let (_dir, path) = written(&story());
        let mut bytes = fs::read(&path).unwrap();
        bytes[12] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let problem = Journal::open(&path).unwrap_err();
        assert_eq!(problem.sentence, format!("line 1 of {} is damaged", path.display()));
        assert!(problem.hint.unwrap().contains("--fresh"));
        assert!(fs::read(&path).unwrap() == bytes);
    }

    #[test]
    fn an_intact_record_of_another_version_is_never_cut() {
        let (_dir, path) = written(&[start(1)]);
        let json = r#"{"kind":"merger","with":3}"#;
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        let bytes = [fs::read(&path).unwrap(), line.into_bytes()].concat();
        fs::write(&path, &bytes).unwrap();
        let problem = Journal::open(&path).unwrap_err();
        assert!(
            problem.sentence.starts_with("line 2 of ") && problem.sentence.contains("merger"),
            "{problem}"
        );
        assert!(fs::read(&path).unwrap() == bytes);
    }

    #[test]
    fn generations_without_bits_can_still_be_read() {
        let (_dir, path) = written(&[]);
        let json = r#"{"kind":"generation","generation":3,"members":[],"reason":"first"}"#;
        fs::write(&path, format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))).unwrap();
        let replay = Replay::read(&path).unwrap();
        assert_eq!((replay.last_generation, replay.bits), (3, None));
    }

    #[test]
    fn a_journal_that_cannot_be_opened_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let problem = Journal::open(dir.path()).unwrap_err();
        assert!(problem.sentence.contains(&dir.path().display().to_string()), "{problem}");
    }
}
