//! Control messages between the coordinator and its workers.
//!
//! Version ledger: 1 — first. 2 — rows of different lengths; the options of cells, training and text in the job. 3 —
//! fleets that change: pauses, states from a member, signs of life. 4 — what a worker is doing travels with its signs of
//! life; traces; a generation's message is the same for all members; a coordinator that is started again: what a worker
//! holds in its hello, control states in its reports; failures for good; intervals and number of checkpoints. 5 — profiles.
//! 6 — the precision of products.

use bincode::{Decode, Encode};
use std::ops::Range;

use crate::activity::{Position, Profile, Trace};
use crate::batch::DataShape;
use crate::control::ControlState;
use crate::job::{JobSpec, RunSpec};
use crate::problem::Problem;
use crate::schedule::Work;
use crate::sums::StepSums;

/// Version of everything that travels. Both sides must have the same.
pub const PROTOCOL_VERSION: u16 = 6;

/// One membership: which workers train together. Journaled, never reused.
pub type Generation = u64;

/// A worker for as long as its control connection stands.
pub type WorkerId = u32;

/// From a worker to the coordinator.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum ToCoordinator {
    /// The first message.
    Hello(Hello),
    /// The connections to all peers of the generation stand.
    Connected {
        /// The generation.
        generation: Generation,
    },
    /// The worker has room for this many more batches.
    Credit {
        /// The generation.
        generation: Generation,
        /// Batches.
        batches: u32,
    },
    /// The worker lives, and this is what its training thread is doing: sent every second.
    Alive(Position),
    /// A step is done.
    Step(StepReport),
    /// An evaluation is done; equal on every worker.
    Evaluation {
        /// The generation.
        generation: Generation,
        /// Steps done when it was made.
        step: u64,
        /// The sums over the validation data.
        sums: StepSums,
        /// The control state after it.
        control: ControlState,
    },
    /// The digest of the whole state after a step; must be equal on every worker.
    Digest {
        /// The generation.
        generation: Generation,
        /// Steps done.
        step: u64,
        /// The digest.
        digest: u64,
    },
    /// The worker has stopped after a step.
    Stopped {
        /// The generation.
        generation: Generation,
        /// The state that it holds; none if the generation ended before it had one.
        state: Option<HeldState>,
        /// Why.
        why: Stop,
    },
    /// The worker cannot go on, and why, in words for the user.
    Failed {
        /// A sentence for the user.
        sentence: String,
        /// What to do about it.
        hint: Option<String>,
        /// Whoever tries again fails again.
        is_final: bool,
    },
    /// What the network wrote at an epoch's end, as [`Welcome::sample`] asked; only rank 0 does.
    Sample {
        /// The generation.
        generation: Generation,
        /// Steps done.
        step: u64,
        /// The text; shorter than asked for where the network is slow.
        tokens: Vec<u32>,
    },
    /// What its training thread did last: sent when a generation breaks, and when the thread has not moved for a while.
    Trace(Trace),
    /// What it did in the steps that [`Form::profile`] names, when it has done them or is about to rest.
    Profile(Profile),
}

/// How far the state is that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct HeldState {
    /// Steps done.
    pub step: u64,
    /// The evaluation that belongs to this step is not done: the state is that of the step, but not whole.
    pub owes_evaluation: bool,
}

/// Why a worker stopped.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Stop {
    /// The schedule is at its end.
    Finished,
    /// All workers agreed to stop after this step because one was told to drain.
    Drained,
    /// All workers agreed to stop after this step because another generation is to be formed.
    Paused,
    /// The coordinator aborted the generation; the partial step is dropped.
    Aborted,
    /// A peer was lost or is silent, in words; the partial step is dropped. Usually the coordinator learns more of
    /// it from the peer's own connection.
    Broken(String),
    /// The loss or the gradient of the next step is not finite; its update was not applied.
    NonFinite,
    /// As many steps were left out as the job allows, because their loss or gradient was not finite.
    SkipLimit,
    /// The epoch's mean loss is higher than the job allows, measured by the first epoch's.
    Diverged,
    /// The validation loss has not become lower for as many epochs as the job waits: the run is done.
    NoImprovement,
}

/// Who a worker is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// A name for people: given with `--name`, else host name and process id.
    pub name: String,
    /// Package version of the binary, for people.
    pub build: String,
    /// What computes, e.g. `cpu (AVX-512)`.
    pub device: String,
    /// Everything a device's bits depend on; must be equal across a fleet.
    pub bits: String,
    /// Threads that compute.
    pub threads: u32,
    /// Port of the data plane.
    pub data_port: u16,
    /// Host of the data plane, if it is not the control connection's own address.
    pub advertise: Option<String>,
    /// `HOST:PORT` of the worker's own metrics.
    pub metrics: Option<String>,
    /// Drawn at random when the process started: whoever comes with a known one has come again.
    pub incarnation: u64,
    /// What it holds of a run that it has worked for.
    pub held: Option<Held>,
}

/// What a worker holds that has lost its coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    /// The run.
    pub run_id: String,
    /// The last generation it belonged to.
    pub generation: Generation,
    /// It can tell again of every step from this one on.
    pub reports_from: u64,
    /// What it does.
    pub holding: Holding,
}

/// What a worker does that has lost its coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Holding {
    /// It works on in its generation, as far as it can.
    Place {
        /// Its rank.
        rank: u32,
        /// Its shards.
        shards: Range<u32>,
        /// The work whose batch it lacks; none at the schedule's end.
        next: Option<Work>,
        /// Batches that it has room for.
        window: u32,
    },
    /// It has left the generation and rests.
    State(HeldState),
}

/// Longest text in a [`Hello`]. With it, and at most [`WORKER_LIMIT`] workers, every [`Form`] fits into a frame.
pub const HELLO_TEXT_BYTES: usize = 256;

/// Workers that may be connected at once: as many as there may be shards.
pub const WORKER_LIMIT: usize = 16_384;

impl Hello {
    /// Checks the texts, which go to people's terminals and to every other worker.
    ///
    /// # Errors
    /// One is too long, or holds what no terminal should be sent.
    pub fn check(&self) -> Result<(), Problem> {
        let texts = [
            ("name", Some(&self.name)),
            ("build", Some(&self.build)),
            ("device", Some(&self.device)),
            ("bits", Some(&self.bits)),
            ("advertise", self.advertise.as_ref()),
            ("metrics", self.metrics.as_ref()),
            ("run", self.held.as_ref().map(|held| &held.run_id)),
        ];
        for (what, text) in texts.into_iter().filter_map(|(what, text)| Some((what, text?))) {
            if text.len() > HELLO_TEXT_BYTES {
                return Err(Problem::usage(format!(
                    "the worker's {what} has {} bytes, the most supported is {HELLO_TEXT_BYTES}",
                    text.len()
                )));
            }
            if text.chars().any(char::is_control) {
                return Err(Problem::usage(format!("the worker's {what} {text:?} has control characters")));
            }
        }
        Ok(())
    }
}

/// One finished step as one worker saw it.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub struct StepReport {
    /// The generation.
    pub generation: Generation,
    /// Steps done, this one included.
    pub step: u64,
    /// The sums of all shards.
    pub sums: StepSums,
    /// Norm of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// The control state after the step.
    pub control: ControlState,
    /// Where the time of the step went.
    pub seconds: PhaseSeconds,
}

impl StepReport {
    /// Whether the step was left out because it is not finite.
    pub fn is_skipped(&self) -> bool {
        !self.sums.is_finite(self.gradient_norm)
    }
}

/// Wall-clock seconds of the phases of a step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Encode, Decode)]
pub struct PhaseSeconds {
    /// Waiting for the batch.
    pub data: f64,
    /// Forward, backward, adding own shards.
    pub compute: f64,
    /// Waiting for the collective.
    pub reduce: f64,
    /// Clipping and the optimizer.
    pub update: f64,
}

/// From the coordinator to a worker.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum ToWorker {
    /// The answer to [`Hello`].
    Welcome(Box<Welcome>),
    /// The worker belongs to a new generation.
    Form(Form),
    /// The worker is not needed now: there are more workers than shards, or the others train. It may still be
    /// asked to go on from what it holds.
    StandBy,
    /// Stop after a step, all together.
    Drain,
    /// Stop after a step, all together, for another generation.
    Pause {
        /// The generation that ends.
        generation: Generation,
    },
    /// Drop the partial step of this generation.
    Abort {
        /// The generation.
        generation: Generation,
    },
    /// Stream the state after the first finished step that is at least this one and has a digest, if the job has any.
    SendState {
        /// Steps done.
        at_step: u64,
    },
    /// The run is over for this worker.
    Goodbye(Goodbye),
}

/// How a run ended, or why a worker is sent away.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Goodbye {
    /// The run is done.
    Done,
    /// The run stopped on request and can go on later.
    Requeue,
    /// The run failed, or the worker is refused; why, in words.
    Failed(String),
    /// The run failed, and would fail again; why, in words.
    Final(String),
}

/// What the run is.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Welcome {
    /// Name of the run, unique.
    pub run_id: String,
    /// Counts the starts of the coordinator.
    pub coordinator_epoch: u64,
    /// The worker's number for as long as this connection stands.
    pub worker_id: WorkerId,
    /// Steps on record: whoever holds reports of this step or later ones tells them again.
    pub on_record: u64,
    /// A worker that has lost its coordinator holds what it has for so long.
    pub park_timeout_seconds: u32,
    /// What is computed.
    pub job: JobSpec,
    /// How long.
    pub run: RunSpec,
    /// What the data looks like.
    pub data: DataShape,
    /// The text to be written at each epoch's end, if any.
    pub sample: Option<SampleRequest>,
}

/// A text that the network is to write, for people. It changes nothing of the training.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct SampleRequest {
    /// What it continues, at least one token.
    pub prime: Vec<u32>,
    /// Number of tokens besides the prime.
    pub length: u32,
    /// What logits are divided by, above 0.
    pub temperature: f64,
    /// Another seed, another text.
    pub seed: u64,
}

/// A generation: the same message for all of its members, so that it is encoded once. Each finds itself in it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Form {
    /// The generation.
    pub generation: Generation,
    /// All members by rank.
    pub members: Vec<Member>,
    /// Steps done in the state to start from.
    pub step: u64,
    /// The evaluation that belongs to the last of them comes first.
    pub owes_evaluation: bool,
    /// Where that state comes from.
    pub state: StateSource,
    /// Steps of which the members write down how their time goes, each as the number of steps done before it; may be empty.
    pub profile: Range<u64>,
}

/// One member of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Member {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its name for people.
    pub name: String,
    /// `HOST:PORT` of its data plane.
    pub address: String,
    /// The shards it holds.
    pub shards: Range<u32>,
}

impl Form {
    /// The position of a worker in `members`.
    pub fn rank_of(&self, id: WorkerId) -> Option<u32> {
        let rank = self.members.iter().position(|member| member.worker_id == id)?;
        Some(rank as u32)
    }
}

/// Where a worker gets the state that a generation starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum StateSource {
    /// Initialised from the job's seed.
    Initial,
    /// Streamed by the coordinator, from a checkpoint.
    Coordinator,
    /// Every member holds it already.
    Kept,
    /// The member of this rank holds it and sends it to the others.
    Member(u32),
}
