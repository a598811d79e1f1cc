//! Every reader of bytes from outside, each as a function that takes any bytes. A reader may refuse them; what it
//! accepts must come back when it is written and read again. Nothing may panic.
//!
//! The fuzz targets call these functions, and `tests/fuzz_corpus.rs` in the main workspace calls them with every file
//! of the corpus.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use coordinator::data::fuzzing;
use coordinator::store::checkpoint::Checkpoint;
use coordinator::store::diff;
use coordinator::store::inspect::inspect;
use coordinator::store::journal::Replay;
use coordinator::store::metrics_log::{self, MetricsLog};
use coordinator::store::run_dir::{OpenMode, RunDir, StoredRun};
use coordinator::store::state::StateImage;
use coordinator::store::weights::{ArrayOptions, Weights};
use kernels::Simd;
use model::cpu::CpuDevice;
use model::device::Device;
use protocol::batch::{Batch, DataShape};
use protocol::cell::{Cell, CellOptions};
use protocol::frame::{BulkHeader, BulkKind, Frame, decode, encode_bulk, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::job::{InitialState, JobFile, Precision, differences};
use protocol::layout::{Head, Input, ModelShape, StateLayout};
use protocol::message::{Member, ToCoordinator, ToWorker};
use protocol::problem::Problem;
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use protocol::tree::cover;
use tempfile::TempDir;
use worker::collective::mesh::{Mesh, Place};
use worker::collective::nccl::offer;
use worker::collective::tcp::TcpCollective;
use worker::collective::{Collective, Result as Collected};
use worker::sums_exchange::{Wish, exchange_sums};

/// A reader, and the name of its folder of the corpus.
pub type Reader = (&'static str, fn(&[u8]));

/// All of them.
pub const READERS: [Reader; 14] = [
    ("frame", frame),
    ("message", message),
    ("handshake", handshake),
    ("batch", batch),
    ("job_file", job_file),
    ("idx", idx),
    ("text", text),
    ("checkpoint", checkpoint),
    ("journal", journal),
    ("state", state),
    ("weights", weights),
    ("run_dir", run_dir),
    ("data_plane", data_plane),
    ("nccl_offer", nccl_offer),
];

/// The contents of a frame, in both directions, with the bulk header.
pub fn frame(bytes: &[u8]) {
    let frame = Bytes::copy_from_slice(bytes);
    match decode::<ToWorker>(frame.clone()) {
        Ok(Frame::Message(message)) => assert_eq!(encode_message(&message), frame),
        Ok(Frame::Bulk(header, payload)) => assert_eq!(encode_bulk(&header, &payload), frame),
        Err(error) => drop(error.to_string()),
    }
    if let Ok(Frame::Message(message)) = decode::<ToCoordinator>(frame.clone()) {
        if let ToCoordinator::Hello(hello) = &message {
            let _ = hello.check();
        }
        assert_eq!(encode_message(&message), frame);
    }
}

/// A control message without its frame's kind: the fuzzer need not find that byte again and again.
pub fn message(bytes: &[u8]) {
    frame(&[&[0], bytes].concat());
}

/// Whatever a stranger says before it has proved the token: its hello and its proof, to both sides.
pub fn handshake(bytes: &[u8]) {
    let Some((hello, rest)) = bytes.split_first_chunk::<HELLO_BYTES>() else { return };
    let token = Token::new("a token that nobody knows");
    for plane in [Plane::Control, Plane::Data] {
        let sides = [Handshake::opener(plane, &token), Handshake::answerer(plane, &token)];
        for side in sides.into_iter().flatten() {
            let (Ok(proofs), Some(proof)) = (side.proofs(hello), rest.first_chunk::<PROOF_BYTES>()) else {
                continue;
            };
            // Without the token a proof is right with one chance in 2^256.
            assert!(proofs.check(proof).is_err(), "a stranger was let in");
        }
    }
}

/// A batch, for a text, for labelled lines and for images.
pub fn batch(bytes: &[u8]) {
    let model = ModelShape {
        cell: Cell::Gru,
        options: CellOptions::PLAIN,
        hidden_sizes: vec![2],
        bidirectional: false,
        input: Input::OneHot(5),
        classes: 5,
        head: Head::EveryStep,
        initial_state: InitialState::Zero,
        carries_state: false,
        reset_token: None,
        precision: Precision::F32,
    };
    let schedule = Schedule { steps_per_epoch: 6, evaluation_batches: 7, total_steps: 8 };
    let labelled = ModelShape { head: Head::Final, classes: 3, ..model.clone() };
    let images = ModelShape { input: Input::Bytes(2), head: Head::Final, ..model.clone() };
    for model in [model, labelled, images] {
        let shape = DataShape { model, seq_len: 2, schedule };
        if let Some(batch) = Batch::from_bytes(bytes, &shape) {
            assert_eq!(Batch::from_bytes(&batch.to_bytes(), &shape).as_ref(), Some(&batch));
        }
    }
}

/// A job file.
pub fn job_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for preset in ["char-lstm", "mnist-rnn", "classify-text"] {
        if let Ok(file) = JobFile::resolve(preset, Some(text), &[]) {
            assert_eq!(JobFile::resolve("char-gru", Some(&file.to_toml()), &[]).as_ref(), Ok(&file));
            assert!(differences(&file.job, &file.job).is_empty());
        }
    }
}

/// A file of images and a file of labels.
pub fn idx(bytes: &[u8]) {
    fuzzing::idx(bytes);
}

/// A text to train on: whole, by lines, and as labelled lines.
pub fn text(bytes: &[u8]) {
    fuzzing::text(bytes);
}

/// A checkpoint.
pub fn checkpoint(bytes: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::from_bytes(bytes) {
        assert_eq!(Checkpoint::from_bytes(&checkpoint.to_bytes()).as_ref(), Ok(&checkpoint));
    }
}

/// A state as a worker streams it, filled up to its length: any bytes of that length are taken.
pub fn state(bytes: &[u8]) {
    let settings = [("hidden_size", "2"), ("num_layers", "1"), ("batch_size", "3"), ("shards", "2")];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let job = JobFile::resolve("char-gru", None, &settings).expect("the job is usable").job;
    let layout = StateLayout::of(&job, 5, 5);
    if bytes.len() != layout.image_bytes() {
        assert!(StateImage::new(&layout, bytes.to_vec()).is_err());
    }
    // What decides how a run goes on is at the end.
    let mut whole = vec![0; layout.image_bytes().saturating_sub(bytes.len())];
    whole.extend(bytes.iter().take(layout.image_bytes()));
    let mut image = StateImage::new(&layout, whole.clone()).expect("it has the length");
    let (progress, control) = (image.progress(), image.control());
    let _ = (image.is_whole(), image.best_step(), control.early_end(&job, progress), control.best_epoch());
    image.set_control(&control);
    assert_eq!(image.into_bytes(), whole);
}

/// Parameters to start from: safetensors of anybody, and NumPy's archives.
pub fn weights(bytes: &[u8]) {
    for cell in [Cell::Lstm, Cell::Gru] {
        let _ = Weights::from_bytes("weights", bytes, cell, &ArrayOptions::default());
    }
}

/// The journal of a run.
pub fn journal(bytes: &[u8]) {
    if let Ok(replay) = Replay::from_lines(bytes, Path::new("journal")) {
        assert_eq!(replay.intact_bytes + replay.torn_bytes, bytes.len() as u64);
        // What is intact stays what it was when the rest is cut off.
        let intact = &bytes[..replay.intact_bytes as usize];
        let again = Replay::from_lines(intact, Path::new("journal"));
        // As texts: a loss may be a NaN, which equals nothing.
        assert_eq!(
            format!("{again:?}"),
            format!("{:?}", Ok::<_, Problem>(Replay { torn_bytes: 0, ..replay }))
        );
    }
}

/// A file of a run directory in which all others are sound: numbers, manifest, digest of the data, job.
pub fn run_dir(bytes: &[u8]) {
    static RUN: LazyLock<(TempDir, JobFile, String)> = LazyLock::new(|| {
        let checkpoint =
            Checkpoint::from_bytes(include_bytes!("../corpus/checkpoint/text")).expect("it is sound");
        let settings = JobFile::resolve("char-lstm", None, &[]).expect("the preset is usable");
        let file = JobFile { job: checkpoint.job.clone(), ..settings };
        let dir = tempfile::tempdir().expect("a folder for temporary files");
        let run =
            RunDir::open(dir.path(), OpenMode::Fresh, &file, &checkpoint.data_digest).expect("it is new");
        run.checkpoints().write(&checkpoint, 1).expect("a checkpoint can be written");
        std::fs::write(run.metrics_path(), "").expect("a file can be written");
        (dir, file, checkpoint.data_digest)
    });
    let (dir, file, digest) = &*RUN;
    let dir = dir.path();
    let names = ["metrics.jsonl", "checkpoints/manifest.json", "data.toml", "job.toml"];
    let Some((which, bytes)) = bytes.split_first() else { return };
    let path = dir.join(names[usize::from(*which) % names.len()]);
    let sound = std::fs::read(&path).expect("the file is there");
    std::fs::write(&path, bytes).expect("a file can be written");
    let _ = (inspect(dir), diff::diff(dir, dir), StoredRun::of(dir));
    if let Ok(lines) = metrics_log::read(&path) {
        let _ = lines.len();
    }
    if let Ok(run) = RunDir::open(dir, OpenMode::Resume, file, digest) {
        let _ = run.checkpoints().newest_verified();
        let log = MetricsLog::open(&run.metrics_path(), 5).expect("whatever is in it can be dropped");
        assert!(log.last_step() <= 5);
    }
    std::fs::write(&path, sound).expect("a file can be written");
}

/// What another worker sends over the data plane, as it is, or as the contents of frames with the right checksums. One
/// that sums, gathers and exchanges ends all that, whatever came.
pub fn data_plane(bytes: &[u8]) {
    thread_local!(static DEVICE: CpuDevice = small_device());
    let Some((is_raw, bytes)) = bytes.split_first() else { return };
    let sent = if is_raw & 1 == 1 { bytes.to_vec() } else { frames(bytes) };
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    // Nobody reads yet: what does not fit is not sent.
    theirs.set_nonblocking(true).expect("a socket");
    let _ = theirs.write(&sent);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let member =
        |worker_id, shards| Member { worker_id, name: String::new(), address: String::new(), shards };
    let members = vec![member(1, 0..1), member(2, 1..SHARDS)];
    let mesh = Mesh {
        place: Place { generation: 1, rank: 0, members: members.clone() },
        streams: vec![None, Some(TcpStream::from(OwnedFd::from(ours)).into())],
    };
    // The end of the stream comes long before.
    let collective = TcpCollective::new(mesh, Duration::from_secs(60), Default::default());
    let mut collective = collective.expect("threads can be started");
    let _ = DEVICE.with(|device| -> Collected<()> {
        let (own, mut sum) = (device.zeros(BUCKET)?, device.zeros(BUCKET)?);
        let nodes: Vec<_> = cover(SHARDS, 0..1).into_iter().map(|node| (node, &own)).collect();
        let ticket = collective.begin_reduce(device, 0..BUCKET, &nodes, &mut sum)?;
        collective.wait(device, ticket, &mut sum)?;
        let ticket = collective.begin_gather(device, &sum, vec![0..8, 8..BUCKET])?;
        collective.wait(device, ticket, &mut sum)?;
        let collective: &mut dyn Collective<CpuDevice> = &mut collective;
        let (sums, _) = exchange_sums(collective, &members, &[vec![StepSums::default()]], Wish::GoOn)?;
        assert_eq!(sums[0].len(), SHARDS as usize);
        Ok(())
    });
}

/// Shards of the data plane's job, and floats of its one bucket.
const SHARDS: u32 = 3;
const BUCKET: usize = 40;

/// Frames as these bytes describe them: kind, generation, ticket, place, block, flags and length in a byte each, then
/// the payload.
fn frames(mut bytes: &[u8]) -> Vec<u8> {
    let mut sent = Vec::new();
    while let Some((description, rest)) = bytes.split_first_chunk::<7>() {
        let [kind, generation, ticket, place, block, flags, length] = *description;
        let kinds = [BulkKind::Reduce, BulkKind::Gather, BulkKind::Batch, BulkKind::State];
        let extreme = |flag: u8, value: u8, most: u32| if flags & flag == 0 { value.into() } else { most };
        let (payload, rest) = rest.split_at(usize::from(length).min(rest.len()));
        let is_bytes = u64::from(flags & 1) << 31;
        let header = BulkHeader {
            kind: kinds[usize::from(kind) % kinds.len()],
            generation: generation.into(),
            step: 0,
            sequence: extreme(2, block, u32::MAX),
            tag: u64::from(extreme(4, ticket, u32::MAX)) << 32
                | is_bytes
                | u64::from(extreme(8, place, u32::MAX >> 1)),
        };
        let frame = encode_bulk(&header, payload);
        sent.extend((frame.len() as u32).to_be_bytes());
        sent.extend_from_slice(&frame);
        bytes = rest;
    }
    sent
}

fn small_device() -> CpuDevice {
    let settings = [("hidden_size", "2"), ("num_layers", "1"), ("batch_size", "3"), ("shards", "3")];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let job = JobFile::resolve("char-gru", None, &settings).expect("the job is usable").job;
    let simd = Simd::detect();
    CpuDevice::new(simd, 1, StateLayout::of(&job, 5, 5), &job, false).expect("a thread can be started")
}

/// What another worker says of its NCCL.
pub fn nccl_offer(bytes: &[u8]) {
    let Some(said) = offer::decode(bytes) else { return };
    if said.is_ok() {
        // Not always the same bytes: a number that no NCCL has may be written in two ways.
        assert_eq!(offer::decode(&offer::encode(&said)).as_ref(), Some(&said));
    }
    let _ = offer::agree(&["one", "other"], &[said.clone(), said]);
}
