//! What the training thread is doing and did last. It writes this down itself, a word at each change of phase; the session
//! reads it from beside, also when the thread hangs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use protocol::activity::{Activity, Phase, Position, Profile, ProfileEvent, TRACE_EVENTS, Trace, TraceEvent};
use protocol::message::Generation;

use crate::collective::tcp::DataPlaneBytes;

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Tracer {
    started: Instant,
    data_plane: Arc<DataPlaneBytes>,
    /// Batches that have come and were not taken yet.
    batches: Arc<AtomicU32>,
    state: Arc<Mutex<State>>,
}

struct State {
    generation: Generation,
    phase: Phase,
    step: u64,
    since: Instant,
    /// The longest that each phase has taken.
    longest: [Option<Duration>; Phase::ALL.len()],
    events: VecDeque<TraceEvent>,
    profile: Recording,
}

/// The steps of a profile.
#[derive(Default)]
struct Recording {
    steps: Range<u64>,
    /// Those that nobody has taken yet.
    events: Vec<ProfileEvent>,
    has_begun: bool,
    /// The event that ends the last step is among them, or was.
    is_complete: bool,
}

/// Events that are sent together, far below a frame's limit.
const PROFILE_PART: usize = 1 << 16;

impl Tracer {
    pub(crate) fn new(data_plane: Arc<DataPlaneBytes>) -> Self {
        let now = Instant::now();
        let state = State {
            generation: 0,
            phase: Phase::Idle,
            step: 0,
            since: now,
            longest: [None; Phase::ALL.len()],
            events: VecDeque::with_capacity(TRACE_EVENTS),
            profile: Recording::default(),
        };
        Self { started: now, data_plane, batches: Arc::default(), state: Arc::new(Mutex::new(state)) }
    }

    /// A generation begins: its operations are counted from 0, and it has no batches yet. These steps belong to the profile.
    pub(crate) fn begin(&self, generation: Generation, step: u64, profile: Range<u64>) {
        self.data_plane.begin_generation();
        self.batches.store(0, Ordering::Relaxed);
        {
            let mut state = self.lock();
            state.generation = generation;
            if state.profile.steps != profile {
                state.profile = Recording { steps: profile, ..Recording::default() };
            }
        }
        self.enter(Phase::Connect, step);
    }

    /// The training thread enters a phase, `step` steps being done.
    pub(crate) fn enter(&self, phase: Phase, step: u64) {
        // The last such line of a dead process says where it was: `scripts/soak-kills`.
        tracing::trace!(target: "lockstep_phase", "worker {}: {}", std::process::id(), phase.name());
        let now = Instant::now();
        let mut state = self.lock();
        let (place, took) = (state.phase as usize, now - state.since);
        state.longest[place] = state.longest[place].max(Some(took));
        (state.phase, state.step, state.since) = (phase, step, now);
        if state.events.len() == TRACE_EVENTS {
            state.events.pop_front();
        }
        let event = TraceEvent {
            at_ms: (now - self.started).as_millis() as u64,
            generation: state.generation,
            phase,
            step,
            operations: self.data_plane.operations(),
            bytes: self.data_plane.sent() + self.data_plane.received(),
        };
        state.events.push_back(event);
        self.record(&mut state, now, Activity::Phase(phase));
    }

    /// The training thread has handed a bucket to the collective.
    pub(crate) fn bucket_left(&self, bucket: u32) {
        let mut state = self.lock();
        self.record(&mut state, Instant::now(), Activity::Bucket(bucket));
    }

    fn record(&self, state: &mut State, now: Instant, activity: Activity) {
        let (step, profile) = (state.step, &mut state.profile);
        // The first event behind the last step says when that was over.
        let ends = profile.has_begun && step >= profile.steps.end;
        if profile.is_complete || !(ends || profile.steps.contains(&step)) {
            return;
        }
        (profile.has_begun, profile.is_complete) = (true, ends);
        profile.events.push(ProfileEvent {
            at_us: (now - self.started).as_micros() as u64,
            step,
            activity,
            bytes: self.data_plane.sent() + self.data_plane.received(),
        });
    }

    /// What a profile has of this worker and nobody has taken yet; unless the thread rests, only when that is the end of it, or
    /// much.
    pub(crate) fn take_profile(&self, is_over: bool) -> Option<Profile> {
        let mut state = self.lock();
        let profile = &mut state.profile;
        let is_much = profile.events.len() >= PROFILE_PART;
        let is_ready = !profile.events.is_empty() && (profile.is_complete || is_much || is_over);
        is_ready.then(|| Profile {
            now_us: self.started.elapsed().as_micros() as u64,
            events: std::mem::take(&mut profile.events),
            is_complete: profile.is_complete,
        })
    }

    /// A batch has come.
    pub(crate) fn batch_came(&self) {
        self.batches.fetch_add(1, Ordering::Relaxed);
    }

    /// The training thread has taken a batch.
    pub(crate) fn batch_taken(&self) {
        // One that no session has counted came from memory.
        let _ = self.batches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }

    /// Where the training thread is.
    pub(crate) fn position(&self) -> Position {
        self.position_in(&self.lock())
    }

    fn position_in(&self, state: &State) -> Position {
        let waits = match state.phase {
            Phase::Idle | Phase::Connect | Phase::Transfer | Phase::Reduce => true,
            Phase::Data => self.batches.load(Ordering::Relaxed) == 0,
            Phase::Compute | Phase::Update | Phase::Snapshot | Phase::Evaluate | Phase::Sample => false,
        };
        Position {
            generation: state.generation,
            phase: state.phase,
            step: state.step,
            waits,
            for_ms: milliseconds(state.since.elapsed()),
            longest_ms: state.longest[state.phase as usize].map(milliseconds),
            operations: self.data_plane.operations(),
            bytes: self.data_plane.sent() + self.data_plane.received(),
            waits_for: self.data_plane.waits_for(),
        }
    }

    /// Where it is, and what it did last.
    pub(crate) fn trace(&self) -> Trace {
        let state = self.lock();
        Trace {
            at_ms: self.started.elapsed().as_millis() as u64,
            position: self.position_in(&state),
            events: state.events.iter().copied().collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock can panic")
    }
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_has_the_last_phases_and_how_long_they_took_at_most() {
        let tracer = Tracer::new(Arc::default());
        tracer.begin(3, 7, 0..0);
        for step in 7..200 {
            tracer.enter(Phase::Data, step);
            tracer.enter(Phase::Compute, step);
            if step == 100 {
                std::thread::sleep(Duration::from_millis(20));
            }
            tracer.enter(Phase::Reduce, step);
        }
        let trace = tracer.trace();
        assert_eq!(trace.events.len(), TRACE_EVENTS);
        let last = trace.events.last().unwrap();
        assert_eq!((last.generation, last.phase, last.step), (3, Phase::Reduce, 199));
        assert!(trace.position.waits && trace.position.longest_ms.is_some());

        tracer.enter(Phase::Compute, 200);
        let position = tracer.position();
        assert!(!position.waits && position.longest_ms >= Some(20), "{position:?}");
        // With a batch there, whoever still waits for one hangs.
        tracer.enter(Phase::Data, 200);
        assert!(tracer.position().waits);
        tracer.batch_came();
        assert!(!tracer.position().waits);
        tracer.batch_taken();
        tracer.batch_taken();
        assert!(tracer.position().waits);
        for (place, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, place);
        }
    }

    #[test]
    fn a_profile_has_its_steps_and_the_end_of_the_last_one() {
        let tracer = Tracer::new(Arc::default());
        tracer.begin(3, 7, 9..11);
        for step in 7..15 {
            if step == 10 {
                // Another generation goes on with it.
                tracer.begin(4, step, 9..11);
                let profile = tracer.take_profile(true).unwrap();
                assert_eq!((profile.events.len(), profile.is_complete), (3, false));
            }
            assert_eq!(tracer.take_profile(false).is_some(), step == 12);
            tracer.enter(Phase::Compute, step);
            tracer.bucket_left(0);
        }
    }
}
