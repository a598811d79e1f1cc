//! The bytes of everything that travels, one frame of every kind, as `wire/vN.txt` has them for protocol version N.
//!
//! Whoever changes a message, a field or their order changes these bytes and fails here: count `PROTOCOL_VERSION` up,
//! write a line in its ledger, and put the text that this test prints into the new version's file.

use std::fmt::Write;

use bytes::Bytes;
use protocol::activity::{Activity, Phase, Position, Profile, ProfileEvent, Trace, TraceEvent};
use protocol::batch::{Batch, DataShape, Inputs, ShardBatch};
use protocol::cell::{Cell, CellOptions};
use protocol::control::{ControlState, EpochSums};
use protocol::frame::{BulkHeader, BulkKind, Frame, decode, encode_bulk, encode_message};
use protocol::job::{InitialState, JobFile, Precision};
use protocol::layout::{Head, Input, ModelShape};
use protocol::message::{
    Form, Goodbye, Held, HeldState, Hello, Holding, Member, PROTOCOL_VERSION, PhaseSeconds, SampleRequest,
    StateSource, StepReport, Stop, ToCoordinator, ToWorker, Welcome,
};
use protocol::schedule::{Schedule, Work};
use protocol::sums::StepSums;

const SUMS: StepSums =
    StepSums { loss: 0.5, weight: 2, correct: 1, rows: 3, row_hash: 0x0123_4567_89ab_cdef, non_finite: true };

const CONTROL: ControlState = ControlState {
    epoch: EpochSums { loss: 0.5, weight: 2, correct: 1 },
    first_epoch_loss: 1.5,
    best_validation_loss: 2.5,
    epochs_without_improvement: 3,
    evaluated_epochs: 4,
    learning_rate_scale: 0.5,
    skipped_updates: 5,
};

/// All keys, so that another default changes nothing here.
const JOB: &str = r#"
[job]
task = "chars"
cell = "lstm"
num_layers = 1
hidden_size = 2
hidden_sizes = [2]
bidirectional = false
embedding_size = 3
activation = "tanh"
recurrent_activation = "hard_sigmoid"
forget_bias = 1.0
peepholes = true
cell_clip = 3.0
projection = 1
reset = "after"
initial_state = "learnt"
carry_state = true
batch_size = 3
seq_len = 2
shards = 3
seed = 7
init = "truncated_normal"
init_scale = 0.5
head_init = "same"
optimizer = "sgd"
learning_rate = 0.25
decay = "cosine"
decay_epochs = 4
decay_factor = 0.5
beta1 = 0.5
beta2 = 0.75
epsilon = 0.125
epsilon_placement = "after_correction"
momentum = 0.5
clip = "global"
clip_norm = 5.0
keep_prob = 0.5
keep_probs = [0.25]
variational_dropout = true
precision = "bf16"
non_finite = "skip"
skip_limit = 6
divergence_factor = 2.0
patience = 3
validation_fraction = 0.25
train_samples = 0
validation_samples = 0
init_from = "0101010101010101010101010101010101010101010101010101010101010101"

[job.text]
mode = "stream"
targets = "wrap"
reset_at = "x"
max_len = 0
pad = "post"

[run]
data = "text"
epochs = 1
steps = 2
recompute = true
checkpoint_seconds = 3
checkpoint_steps = 6
keep_checkpoints = 7
digest_steps = 4
sample_chars = 5
sample_temperature = 0.5
"#;

fn to_coordinator() -> Vec<ToCoordinator> {
    let stops = [
        Stop::Finished,
        Stop::Drained,
        Stop::Paused,
        Stop::Aborted,
        Stop::Broken("why".to_owned()),
        Stop::NonFinite,
        Stop::SkipLimit,
        Stop::Diverged,
        Stop::NoImprovement,
    ];
    let profiled = |activity| ProfileEvent { at_us: 1, step: 2, activity, bytes: 3 };
    let hello = Hello {
        name: "name".to_owned(),
        build: "0.1.0".to_owned(),
        device: "cpu".to_owned(),
        bits: "fma".to_owned(),
        threads: 2,
        data_port: 7171,
        advertise: Some("host".to_owned()),
        metrics: None,
        incarnation: 9,
        held: None,
    };
    let position = Position {
        generation: 1,
        phase: Phase::Reduce,
        step: 2,
        waits: true,
        for_ms: 3,
        longest_ms: Some(4),
        operations: 5,
        bytes: 6,
        waits_for: Some(1),
    };
    let event = TraceEvent { at_ms: 7, generation: 1, phase: Phase::Data, step: 2, operations: 3, bytes: 4 };
    let held = |holding| Some(Held { run_id: "id".to_owned(), generation: 1, reports_from: 2, holding });
    let next = Some(Work::Evaluate { step: 3, index: 4 });
    let place = held(Holding::Place { rank: 1, shards: 2..3, next, window: 5 });
    let at_rest = held(Holding::State(HeldState { step: 2, owes_evaluation: false }));
    let report = StepReport {
        generation: 1,
        step: 2,
        sums: SUMS,
        gradient_norm: 1.5,
        learning_rate: 0.25,
        control: CONTROL,
        seconds: PhaseSeconds { data: 1.0, compute: 2.0, reduce: 3.0, update: 4.0 },
    };
    let mut messages = vec![
        ToCoordinator::Hello(Hello { held: place, ..hello.clone() }),
        ToCoordinator::Hello(Hello { held: at_rest, ..hello.clone() }),
        ToCoordinator::Hello(hello),
        ToCoordinator::Connected { generation: 1 },
        ToCoordinator::Credit { generation: 1, batches: 2 },
        ToCoordinator::Alive(position),
        ToCoordinator::Trace(Trace { at_ms: 9, position, events: vec![event] }),
        ToCoordinator::Profile(Profile {
            now_us: 9,
            events: vec![profiled(Activity::Phase(Phase::Compute)), profiled(Activity::Bucket(1))],
            is_complete: true,
        }),
        ToCoordinator::Step(report),
        ToCoordinator::Evaluation { generation: 1, step: 2, sums: SUMS, control: CONTROL },
        ToCoordinator::Digest { generation: 1, step: 2, digest: 3 },
        ToCoordinator::Failed { sentence: "no".to_owned(), hint: Some("yes".to_owned()), is_final: true },
        ToCoordinator::Sample { generation: 1, step: 2, tokens: vec![3, 4] },
    ];
    let state = Some(HeldState { step: 2, owes_evaluation: true });
    messages.extend(stops.map(|why| ToCoordinator::Stopped { generation: 1, state, why }));
    messages.push(ToCoordinator::Stopped { generation: 1, state: None, why: Stop::Aborted });
    messages
}

fn shape() -> DataShape {
    let model = ModelShape {
        cell: Cell::Lstm,
        options: CellOptions { cell_clip: Some(3.0), projection: Some(1), ..CellOptions::PLAIN },
        hidden_sizes: vec![2],
        bidirectional: false,
        input: Input::Embedding { tokens: 5, size: 3 },
        classes: 5,
        head: Head::EveryStep,
        initial_state: InitialState::Learnt,
        carries_state: true,
        reset_token: Some(4),
        precision: Precision::Bf16,
    };
    let schedule = Schedule { steps_per_epoch: 6, evaluation_batches: 7, total_steps: 8 };
    DataShape { model, seq_len: 2, schedule }
}

fn to_worker() -> Vec<ToWorker> {
    let file = JobFile::resolve("char-lstm", Some(JOB), &[]).unwrap();
    let welcome = Welcome {
        run_id: "id".to_owned(),
        coordinator_epoch: 1,
        worker_id: 2,
        on_record: 3,
        park_timeout_seconds: 4,
        job: file.job,
        run: file.run,
        data: shape(),
        sample: Some(SampleRequest { prime: vec![1], length: 2, temperature: 0.5, seed: 3 }),
    };
    let member = Member { worker_id: 1, name: "name".to_owned(), address: "host:1".to_owned(), shards: 0..3 };
    let form = |state| {
        ToWorker::Form(Form {
            generation: 1,
            members: vec![member.clone()],
            step: 2,
            owes_evaluation: true,
            state,
            profile: 5..9,
        })
    };
    let mut messages = vec![
        ToWorker::Welcome(Box::new(welcome)),
        ToWorker::StandBy,
        ToWorker::Drain,
        ToWorker::Pause { generation: 1 },
        ToWorker::Abort { generation: 1 },
        ToWorker::SendState { at_step: 2 },
    ];
    let sources = [StateSource::Initial, StateSource::Coordinator, StateSource::Kept, StateSource::Member(3)];
    messages.extend(sources.map(form));
    messages.extend(
        [
            Goodbye::Done,
            Goodbye::Requeue,
            Goodbye::Failed("why".to_owned()),
            Goodbye::Final("why".to_owned()),
        ]
        .map(ToWorker::Goodbye),
    );
    messages
}

/// All kinds of input, both kinds of work.
fn batches() -> [(DataShape, Batch); 3] {
    let shard = |shard, rows| ShardBatch { shard, rows };
    let text = Batch {
        work: Work::Train { step: 1, epoch: 2, index: 3 },
        first_slot: 4,
        shards: vec![shard(5, 0..1), shard(6, 1..2)],
        sample_ids: vec![7, 8],
        lengths: vec![2, 1],
        paddings: vec![1, 0],
        inputs: Inputs::Tokens(vec![0, 1, 2, 3, 4]),
    };
    let lines = Batch {
        lengths: vec![1, 2],
        paddings: vec![0, 0],
        inputs: Inputs::LabelledTokens { tokens: vec![0, 1, 2], labels: vec![3, 4] },
        ..text.clone()
    };
    let images = Batch {
        work: Work::Evaluate { step: 1, index: 2 },
        first_slot: 0,
        shards: vec![shard(0, 0..1)],
        sample_ids: vec![1 << 32],
        lengths: vec![2],
        paddings: vec![0],
        inputs: Inputs::Bytes { bytes: vec![9, 8, 7, 6], labels: vec![3] },
    };
    let mut of_images = shape();
    (of_images.model.input, of_images.model.head) = (Input::Bytes(2), Head::Final);
    [(shape(), text), (shape(), lines), (of_images, images)]
}

/// The name of a kind. No `_` here: a new kind does not compile until somebody has come and added it to the list.
fn name_to_coordinator(message: &ToCoordinator) -> &'static str {
    match message {
        ToCoordinator::Hello(_) => "hello",
        ToCoordinator::Connected { .. } => "connected",
        ToCoordinator::Credit { .. } => "credit",
        ToCoordinator::Alive(_) => "alive",
        ToCoordinator::Trace(_) => "trace",
        ToCoordinator::Profile(_) => "profile",
        ToCoordinator::Step(_) => "step",
        ToCoordinator::Evaluation { .. } => "evaluation",
        ToCoordinator::Digest { .. } => "digest",
        ToCoordinator::Stopped { .. } => "stopped",
        ToCoordinator::Failed { .. } => "failed",
        ToCoordinator::Sample { .. } => "sample",
    }
}

/// The same for the other direction.
fn name_to_worker(message: &ToWorker) -> &'static str {
    match message {
        ToWorker::Welcome(_) => "welcome",
        ToWorker::Form(_) => "form",
        ToWorker::StandBy => "stand by",
        ToWorker::Drain => "drain",
        ToWorker::Pause { .. } => "pause",
        ToWorker::Abort { .. } => "abort",
        ToWorker::SendState { .. } => "send state",
        ToWorker::Goodbye(_) => "goodbye",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn everything_that_travels_has_the_bytes_of_its_version() {
    let mut text = String::new();
    for message in to_coordinator() {
        let frame = encode_message(&message);
        writeln!(text, "to coordinator, {}: {}", name_to_coordinator(&message), hex(&frame)).unwrap();
        assert_eq!(decode(frame), Ok(Frame::Message(message)));
    }
    for message in to_worker() {
        let frame = encode_message(&message);
        writeln!(text, "to worker, {}: {}", name_to_worker(&message), hex(&frame)).unwrap();
        assert_eq!(decode(frame), Ok(Frame::Message(message)));
    }
    for kind in [BulkKind::Batch, BulkKind::State, BulkKind::Reduce, BulkKind::Gather] {
        let header = BulkHeader { kind, generation: 1, step: 2, sequence: 3, tag: 4 };
        let frame = encode_bulk(&header, b"payload");
        writeln!(text, "bulk, {kind:?}: {}", hex(&frame)).unwrap();
        assert_eq!(decode::<ToWorker>(frame), Ok(Frame::Bulk(header, Bytes::from_static(b"payload"))));
    }
    for (shape, batch) in batches() {
        let bytes = batch.to_bytes();
        writeln!(text, "batch of {:?}: {}", shape.model.input, hex(&bytes)).unwrap();
        assert_eq!(Batch::from_bytes(&bytes, &shape).as_ref(), Some(&batch));
    }
    let path = format!("{}/tests/wire/v{PROTOCOL_VERSION}.txt", env!("CARGO_MANIFEST_DIR"));
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<&str> = text.lines().filter(|line| !golden.lines().any(|old| old == *line)).collect();
    println!("{text}");
    assert!(
        golden == text,
        "the bytes of version {PROTOCOL_VERSION} are not those of {path}; new or changed:\n{}",
        changed.join("\n")
    );
}
