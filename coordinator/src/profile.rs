//! How the workers' time goes in some steps, for people: a trace in the format that Perfetto and Chrome show, one process a
//! worker. Nothing reads it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use protocol::activity::{Activity, Profile, ProfileEvent};
use protocol::message::WorkerId;
use protocol::problem::Problem;
use serde_json::{Value, json};

use crate::store::files::write_atomic;

/// Steps before the first of a profile: those that touch memory for the first time are not like others.
const WARM_UP_STEPS: u64 = 5;

/// Events of all workers together, above which no more are taken in: what they say must not fill the memory.
const MOST_EVENTS: usize = 1 << 23;

/// The profile of a run, until it is written.
#[derive(Debug)]
pub(crate) struct ProfileFile {
    path: PathBuf,
    /// How many steps it is to have.
    wanted: u64,
    /// Which ones, once the first generation has formed.
    steps: Option<Range<u64>>,
    workers: BTreeMap<WorkerId, Part>,
    is_written: bool,
}

/// What a worker has told.
#[derive(Debug)]
struct Part {
    name: String,
    /// By this process's clock.
    events: Vec<ProfileEvent>,
    is_complete: bool,
}

impl ProfileFile {
    pub(crate) fn new(path: PathBuf, wanted: u64) -> Self {
        Self { path, wanted, steps: None, workers: BTreeMap::new(), is_written: false }
    }

    /// The steps that belong to it, for a generation that begins after so many.
    pub(crate) fn steps(&mut self, done: u64) -> Range<u64> {
        let first = done + WARM_UP_STEPS;
        self.steps.get_or_insert(if self.wanted == 0 { 0..0 } else { first..first + self.wanted }).clone()
    }

    /// Takes in what a worker has told, at this time of this process.
    pub(crate) fn take(&mut self, id: WorkerId, name: String, profile: Profile, now: Duration) {
        let steps = self.steps.clone().unwrap_or_default();
        if self.is_written || self.workers.values().map(|part| part.events.len()).sum::<usize>() > MOST_EVENTS
        {
            return;
        }
        // The clocks of a run start when their processes do. That a message took some time puts its worker that much too
        // late.
        let (now, theirs) = (now.as_micros() as u64, profile.now_us);
        let part = self.workers.entry(id).or_insert(Part { name, events: Vec::new(), is_complete: false });
        part.is_complete |= profile.is_complete;
        let events =
            profile.events.into_iter().filter(|event| steps.contains(&event.step) || event.step == steps.end);
        part.events.extend(events.map(|event| ProfileEvent {
            at_us: now.saturating_add(event.at_us).saturating_sub(theirs),
            ..event
        }));
    }

    /// Whether it can be written now: these workers have told all.
    pub(crate) fn is_ready(&self, members: &[WorkerId]) -> bool {
        let is_complete = |id| self.workers.get(id).is_some_and(|part| part.is_complete);
        !self.is_written && !members.is_empty() && members.iter().all(is_complete)
    }

    /// Writes what there is, once. Gives the sentence that says so.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(&mut self) -> Result<Option<String>, Problem> {
        let Some(steps) = self.steps.clone().filter(|_| !self.is_written && !self.workers.is_empty()) else {
            return Ok(None);
        };
        self.is_written = true;
        write_atomic(&self.path, self.json().to_string().as_bytes())?;
        let (first, last, path) = (steps.start + 1, steps.end, self.path.display());
        Ok(Some(format!("profile of steps {first} to {last}: {path}, for https://ui.perfetto.dev")))
    }

    fn json(&self) -> Value {
        let all = || self.workers.values().flat_map(|part| &part.events);
        let start = all().map(|event| event.at_us).min().unwrap_or(0);
        let mut events = Vec::new();
        for (id, part) in &self.workers {
            let of_process =
                |name: &str, args: Value| json!({"ph": "M", "pid": id, "name": name, "args": args});
            events.push(of_process("process_name", json!({"name": format!("worker {}", part.name)})));
            events.push(of_process("process_sort_index", json!({"sort_index": id})));
            let bytes_before = part.events.first().map_or(0, |event| event.bytes);
            for (at, event) in part.events.iter().enumerate() {
                let ts = event.at_us - start;
                match event.activity {
                    Activity::Phase(phase) => {
                        let mut later = part.events[at + 1..].iter();
                        let next = later.find(|event| matches!(event.activity, Activity::Phase(_)));
                        let args = json!({"bytes": event.bytes.saturating_sub(bytes_before)});
                        events.push(json!({"ph": "C", "pid": id, "ts": ts, "name": "to and from peers", "args": args}));
                        // The last one only says when the one before was over.
                        let Some(next) = next else { continue };
                        let (dur, args) =
                            (next.at_us.saturating_sub(event.at_us), json!({"step": event.step + 1}));
                        events.push(json!({
                            "ph": "X", "pid": id, "tid": 0, "ts": ts, "dur": dur, "name": phase.name(), "args": args
                        }));
                    }
                    Activity::Bucket(bucket) => events.push(json!({
                        "ph": "i", "s": "t", "pid": id, "tid": 0, "ts": ts, "name": format!("bucket {bucket}")
                    })),
                }
            }
        }
        json!({"traceEvents": events, "displayTimeUnit": "ms"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::activity::Phase;

    fn event(at_us: u64, activity: Activity) -> ProfileEvent {
        ProfileEvent { at_us, step: 12, activity, bytes: at_us }
    }

    #[test]
    fn a_profile_has_a_span_for_each_phase_by_one_clock() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = ProfileFile::new(dir.path().join("profile.json"), 10);
        assert_eq!((file.steps(7), file.steps(400)), (12..22, 12..22), "it is about the first generation");
        assert_eq!(file.write().unwrap(), None, "there is nothing");
        let events = [
            event(100, Activity::Phase(Phase::Compute)),
            event(130, Activity::Bucket(3)),
            event(150, Activity::Phase(Phase::Reduce)),
            event(170, Activity::Phase(Phase::Data)),
        ];
        let profile = |now_us, is_complete| Profile { now_us, events: events.to_vec(), is_complete };
        file.take(1, "a".to_owned(), profile(1_000, true), Duration::from_micros(5_000));
        file.take(2, "b".to_owned(), profile(200, false), Duration::from_micros(4_210));
        assert!(file.is_ready(&[1]) && !file.is_ready(&[1, 2]) && !file.is_ready(&[1, 3]));
        let sentence = file.write().unwrap().unwrap();
        assert!(sentence.starts_with("profile of steps 13 to 22: "), "{sentence}");
        assert_eq!(file.write().unwrap(), None, "once");

        let text = std::fs::read(dir.path().join("profile.json")).unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |kind: &str| events.iter().filter(|event| event["ph"] == kind).cloned().collect::<Vec<_>>();
        let spans: Vec<_> = of("X")
            .iter()
            .map(|span| (span["pid"].clone(), span["name"].clone(), span["ts"].clone(), span["dur"].clone()))
            .collect();
        let span = |pid: u32, name: &str, ts: u64, dur: u64| (json!(pid), json!(name), json!(ts), json!(dur));
        assert_eq!(
            spans,
            [
                span(1, "compute", 0, 50),
                span(1, "reduce", 50, 20),
                span(2, "compute", 10, 50),
                span(2, "reduce", 60, 20)
            ]
        );
        assert_eq!(of("X")[0]["args"], json!({"step": 13}));
        assert_eq!((of("i").len(), of("i")[0]["name"].clone()), (2, json!("bucket 3")));
        assert_eq!(of("M")[0]["args"], json!({"name": "worker a"}));
        assert_eq!(of("C")[2]["args"], json!({"bytes": 70}));
    }

    #[test]
    fn nobody_is_asked_for_a_profile_that_is_not_wanted() {
        let mut file = ProfileFile::new(PathBuf::from("nowhere"), 0);
        assert!(file.steps(7).is_empty());
    }
}
