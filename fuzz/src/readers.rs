//! Every reader of bytes from outside, each as a function that takes any bytes. A reader may refuse them; what it
//! accepts must come back when it is written and read again. Nothing may panic.
//!
//! The fuzz targets call these functions, and `tests/fuzz_corpus.rs` in the main workspace calls them with every file
//! of the corpus.

use std::path::Path;

use bytes::Bytes;
use coordinator::data::fuzzing;
use coordinator::store::checkpoint::Checkpoint;
use coordinator::store::journal::Replay;
use coordinator::store::state::StateImage;
use coordinator::store::weights::{ArrayOptions, Weights};
use protocol::batch::{Batch, DataShape};
use protocol::cell::{Cell, CellOptions};
use protocol::frame::{Frame, decode, encode_bulk, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::job::{InitialState, JobFile, differences};
use protocol::layout::{Head, Input, ModelShape, StateLayout};
use protocol::message::{ToCoordinator, ToWorker};
use protocol::problem::Problem;
use protocol::schedule::Schedule;

/// A reader, and the name of its folder of the corpus.
pub type Reader = (&'static str, fn(&[u8]));

/// All of them.
pub const READERS: [Reader; 11] = [
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
