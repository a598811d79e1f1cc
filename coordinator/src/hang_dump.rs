//! What every worker's training thread did last, written into the run directory when a generation breaks: `hangs/`. For
//! people; nothing reads it, and a failure to write it is only logged.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use protocol::activity::Trace;
use protocol::message::{Generation, WorkerId};

use crate::store::files::names_in;

/// Name of the folder inside the run directory.
pub(crate) const FOLDER: &str = "hangs";

/// Files that are kept, the newest ones.
const FILES: usize = 20;

/// Workers whose traces a file has at most.
const WORKERS: usize = 64;

/// The traces of the generation, until it breaks and while it breaks.
#[derive(Debug)]
pub(crate) struct HangDump {
    folder: PathBuf,
    generation: Generation,
    /// What slow members have sent of themselves.
    kept: BTreeMap<WorkerId, (String, Trace)>,
    /// The file of this generation, once it has broken, and how many traces it has.
    open: Option<(PathBuf, usize)>,
}

impl HangDump {
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self { folder: run_dir.join(FOLDER), generation: 0, kept: BTreeMap::new(), open: None }
    }

    /// Another generation has formed.
    pub(crate) fn begin(&mut self, generation: Generation) {
        (self.generation, self.open) = (generation, None);
        self.kept.clear();
    }

    /// The generation breaks. What comes from its members from now on goes to its file.
    pub(crate) fn broken(&mut self, step: u64, why: &str) {
        if self.open.is_some() {
            return;
        }
        let path = self.folder.join(file_name(self.generation));
        let head = format!("generation {} broke after step {step}: {why}\n", self.generation);
        let written = fs::create_dir_all(&self.folder).and_then(|()| fs::write(&path, head));
        if let Err(error) = written {
            tracing::warn!("cannot write {}: {error}", path.display());
            return;
        }
        self.forget_old_files();
        self.open = Some((path, 0));
        for (name, trace) in std::mem::take(&mut self.kept).into_values() {
            self.append(&name, &trace);
        }
    }

    /// Takes in the trace of a worker.
    pub(crate) fn take(&mut self, id: WorkerId, name: &str, trace: Trace) {
        // One that was aborted may say so when the next generation has formed already.
        if trace.position.generation != self.generation {
            return;
        }
        if self.open.is_some() {
            self.append(name, &trace);
        } else if self.kept.len() < WORKERS || self.kept.contains_key(&id) {
            self.kept.insert(id, (name.to_owned(), trace));
        }
    }

    fn append(&mut self, name: &str, trace: &Trace) {
        let Some((path, count)) = self.open.as_mut().filter(|(_, count)| *count < WORKERS) else { return };
        *count += 1;
        let appended = OpenOptions::new()
            .append(true)
            .open(&*path)
            .and_then(|mut file| file.write_all(text(name, trace).as_bytes()));
        if let Err(error) = appended {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    fn forget_old_files(&self) {
        let names = names_in(&self.folder).unwrap_or_default();
        let ours: Vec<_> = names.iter().filter(|name| is_dump(name)).collect();
        for name in ours.iter().take(ours.len().saturating_sub(FILES)) {
            let _ = fs::remove_file(self.folder.join(name));
        }
    }
}

fn file_name(generation: Generation) -> String {
    format!("generation-{generation:08}.txt")
}

/// Whether this is the name of a file that this module writes.
pub(crate) fn is_dump(name: &str) -> bool {
    let number = name.strip_prefix("generation-").and_then(|rest| rest.strip_suffix(".txt"));
    number.is_some_and(|number| number.len() >= 8 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// One worker's trace, for people.
fn text(name: &str, trace: &Trace) -> String {
    let position = trace.position;
    let peer = position.waits_for.map_or_else(String::new, |rank| format!(", waits for rank {rank}"));
    let mut text = format!(
        "\nworker {name}: in {} for {:.3} s, {} steps done{peer}\n\
         seconds ago  phase     step done  operations           bytes\n",
        position.phase.name(),
        f64::from(position.for_ms) / 1e3,
        position.step,
    );
    for event in &trace.events {
        let ago = trace.at_ms.saturating_sub(event.at_ms) as f64 / 1e3;
        let (phase, step) = (event.phase.name(), event.step);
        let _ =
            writeln!(text, "{ago:>11.3}  {phase:<8} {step:>10} {:>11} {:>15}", event.operations, event.bytes);
    }
    text
}

#[cfg(test)]
mod tests {
    use protocol::activity::{Phase, Position, TraceEvent};

    use super::*;

    fn trace(generation: Generation) -> Trace {
        let event =
            TraceEvent { at_ms: 1_000, generation, phase: Phase::Data, step: 30, operations: 12, bytes: 34 };
        let position = Position {
            generation,
            phase: Phase::Reduce,
            step: 30,
            waits: true,
            for_ms: 4_200,
            longest_ms: None,
            operations: 14,
            bytes: 56,
            waits_for: Some(1),
        };
        Trace { at_ms: 9_000, position, events: vec![event] }
    }

    #[test]
    fn a_broken_generation_leaves_a_file_with_its_members_traces() {
        let dir = tempfile::tempdir().unwrap();
        let mut dump = HangDump::new(dir.path());
        dump.begin(7);
        dump.take(1, "slow", trace(7));
        dump.take(2, "old", trace(6));
        assert!(!dir.path().join(FOLDER).exists(), "nothing has broken yet");
        dump.broken(30, "worker x was lost");
        dump.broken(30, "another reason");
        dump.take(2, "other", trace(7));
        let text = fs::read_to_string(dir.path().join("hangs/generation-00000007.txt")).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "generation 7 broke after step 30: worker x was lost");
        assert_eq!(lines[2], "worker slow: in reduce for 4.200 s, 30 steps done, waits for rank 1");
        assert_eq!(lines[4].split_whitespace().collect::<Vec<_>>(), ["8.000", "data", "30", "12", "34"]);
        assert!(lines[6].starts_with("worker other: "), "{text}");
    }

    #[test]
    fn neither_files_nor_traces_grow_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut dump = HangDump::new(dir.path());
        for generation in 1..=30 {
            dump.begin(generation);
            dump.broken(0, "x");
            (0..100).for_each(|id| dump.take(id, "w", trace(generation)));
        }
        let names = names_in(&dir.path().join(FOLDER)).unwrap();
        assert_eq!((names.len(), &*names[0]), (FILES, "generation-00000011.txt"));
        let text = fs::read_to_string(dir.path().join(FOLDER).join(&names[0])).unwrap();
        assert_eq!(text.matches("worker w").count(), WORKERS);
        assert!(names.iter().all(|name| is_dump(name)) && !is_dump("generation-notes.txt"));
    }
}
