//! What the coordinator costs with thousands of workers: a real one in a process of its own, over loopback sockets, and
//! simulated workers here that do all a worker says and computes nothing.
//!
//! Each worker proves the token, says hello, lives, takes its batches and reports each step; there are no connections
//! between workers. For each size of the fleet: time and CPU time until all have joined, until a generation is formed,
//! CPU time of a step and of a second without steps, what follows when a tenth of the workers dies at once, memory,
//! and bytes of the message that forms a generation.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use clap::Parser;
use futures_util::{SinkExt, StreamExt};
use protocol::activity::{Phase, Position};
use protocol::control::ControlState;
use protocol::frame::{BulkKind, Frame, codec, decode, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::job::JobFile;
use protocol::message::{Form, HeldState, Hello, PhaseSeconds, StepReport, Stop, ToCoordinator, ToWorker};
use protocol::sums::StepSums;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio_util::codec::Framed;

/// As many shards as rows: each worker holds at least one.
const SHARDS: u32 = 8192;
/// Steps of an epoch: more than are done here, so that there is no evaluation.
const STEPS_PER_EPOCH: usize = 100;
/// Workers that connect at the same time: well below the handshakes that the coordinator bears at once.
const CONNECTING: usize = 64;
/// Steps before any is counted.
const WARM_STEPS: u64 = 3;
const TOKEN: &str = "a token of the control plane's own";

/// What the coordinator costs with thousands of workers
#[derive(Parser)]
struct Options {
    /// Sizes of the fleet
    #[arg(long, value_delimiter = ',', default_values_t = [100, 500, 1000, 2000, 5000])]
    workers: Vec<u32>,
    /// Steps that are counted
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Be the coordinator of so many workers, in this folder
    #[arg(long, hide = true)]
    coordinate: Option<PathBuf>,
}

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let options = Options::parse();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let runtime = tokio::runtime::Runtime::new()?;
    if let Some(folder) = options.coordinate {
        return runtime.block_on(coordinate(&folder, options.workers[0]));
    }
    println!(
        "| workers | join s | join CPU s | form s | CPU ms per step | idle CPU % | reform s | next step s | reform \
         CPU s | RSS MiB | peak MiB | Form KiB |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for workers in options.workers {
        runtime.block_on(measure(workers, options.steps))?;
    }
    Ok(())
}

/// Is the coordinator until it is killed.
async fn coordinate(folder: &Path, workers: u32) -> Result<()> {
    let text = folder.join("text");
    let length = SHARDS as usize * STEPS_PER_EPOCH * 10 / 9 + 1000;
    std::fs::write(&text, "the quick brown fox\n".repeat(length / 20 + 1))?;
    let (text, workers, shards) = (text.display().to_string(), workers.to_string(), SHARDS.to_string());
    let settings = [
        ("num_layers", "1"),
        ("hidden_size", "1"),
        ("batch_size", &shards),
        ("shards", &shards),
        ("seq_len", "1"),
        ("data", &text),
        ("epochs", "1000"),
        ("digest_steps", "0"),
        ("sample_chars", "0"),
        ("checkpoint_seconds", "1000000"),
        ("workers", &workers),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let any_port: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let config = coordinator::Config {
        preset: "char-gru".to_owned(),
        file: JobFile::resolve("char-gru", None, &settings)?,
        run_dir: folder.join("run"),
        fresh: true,
        init_from: None,
        change_learning_rate: None,
        forecast: None,
        data_dir: None,
        listen: any_port,
        http: any_port,
        token: Token::new(TOKEN),
        tls: None,
        ready_file: Some(folder.join("ready")),
        linger: Duration::ZERO,
        drain_timeout: Duration::ZERO,
        profile_steps: 0,
        json: false,
        build: "control plane".to_owned(),
    };
    let (_sender, signals) = tokio::sync::mpsc::channel(1);
    coordinator::run(config, signals).await?;
    Ok(())
}

/// A coordinator in a process of its own, which ends with this.
struct Coordinator(Child);

impl Coordinator {
    fn start(folder: &Path, workers: u32) -> Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args(["--workers", &workers.to_string(), "--coordinate"])
            .arg(folder)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.0.id())).unwrap_or_default()
    }

    /// CPU seconds so far.
    fn cpu_seconds(&self) -> f64 {
        let stat = self.file("stat");
        // Behind the name, which may hold anything, user and system time are the 12th and 13th field.
        let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
    }

    /// MiB of one line of `status`.
    fn mib(&self, key: &str) -> f64 {
        let status = self.file("status");
        let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
    }

    /// CPU seconds until it has done all that it was sent.
    async fn cpu_when_quiet(&self) -> f64 {
        let mut before = self.cpu_seconds();
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = self.cpu_seconds();
            if now - before < 0.05 {
                return now;
            }
            before = now;
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One generation, shared by all simulated workers.
struct Generation {
    frame: BytesMut,
    form: Form,
    /// Steps done when it formed, and so many parts of later ones.
    parts: AtomicU64,
    connected: AtomicUsize,
    done: watch::Sender<u64>,
    pauses: AtomicBool,
}

/// What the simulated workers share.
struct Fleet {
    generation: Mutex<Option<Arc<Generation>>>,
    /// Of the newest generation, when all its members have connected.
    formed: watch::Sender<u64>,
    /// Steps that may be done.
    allowed: watch::Sender<u64>,
    joined: watch::Sender<u32>,
    connecting: Semaphore,
}

impl Fleet {
    /// The generation that a message forms, if it is one that is known or forms any.
    fn formed_by(&self, frame: &BytesMut) -> Option<Arc<Generation>> {
        let mut newest = self.generation.lock().expect("no holder of this lock can panic");
        if let Some(known) = newest.as_ref().filter(|known| known.frame == *frame) {
            return Some(known.clone());
        }
        let Ok(Frame::Message(ToWorker::Form(form))) = decode(frame.clone().freeze()) else { return None };
        let step = form.step;
        if let Some(known) = newest.as_ref().filter(|known| known.form.generation == form.generation) {
            return Some(known.clone());
        }
        let generation = Arc::new(Generation {
            frame: frame.clone(),
            parts: AtomicU64::new(0),
            connected: AtomicUsize::new(0),
            done: watch::channel(step).0,
            pauses: AtomicBool::new(false),
            form,
        });
        *newest = Some(generation.clone());
        Some(generation)
    }

    fn newest(&self) -> Arc<Generation> {
        let newest = self.generation.lock().expect("no holder of this lock can panic");
        newest.clone().expect("a generation was formed")
    }
}

/// A worker's part in a generation.
struct Place {
    generation: Arc<Generation>,
    step: u64,
    /// Batches that have come for steps that are not done.
    batches: u64,
    /// Its part of the next step is done.
    is_done: bool,
    done: watch::Receiver<u64>,
}

/// Lives until the coordinator lets it go.
async fn live(fleet: Arc<Fleet>, control: SocketAddr, number: u32) -> Result<()> {
    let place = fleet.connecting.acquire().await?;
    let mut stream = TcpStream::connect(control).await?;
    stream.set_nodelay(true)?;
    let own = Handshake::opener(Plane::Control, &Token::new(TOKEN))?;
    let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
    stream.write_all(&own.hello()).await?;
    stream.read_exact(&mut theirs).await?;
    let proofs = own.proofs(&theirs)?;
    stream.write_all(&proofs.ours).await?;
    stream.read_exact(&mut proof).await?;
    proofs.check(&proof)?;
    let mut frames = Framed::new(stream, codec());
    let hello = Hello {
        name: format!("node-{number:05}"),
        build: "control plane".to_owned(),
        device: "none".to_owned(),
        bits: "none".to_owned(),
        threads: 1,
        data_port: 10_000,
        advertise: Some(format!("10.0.{}.{}", number / 250, number % 250)),
        metrics: None,
        incarnation: number.into(),
        held: None,
    };
    frames.send(encode_message(&ToCoordinator::Hello(hello))).await?;
    drop(place);
    fleet.joined.send_modify(|joined| *joined += 1);

    let mut signs_of_life = tokio::time::interval(Duration::from_secs(1));
    let mut allowed = fleet.allowed.subscribe();
    let mut place: Option<Place> = None;
    let mut held = None;
    loop {
        let mut to_send = Vec::new();
        let mut done = place.as_ref().map(|place| place.done.clone());
        let stepped = async {
            match &mut done {
                Some(done) => done.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            frame = frames.next() => {
                let Some(frame) = frame else { return Ok(()) };
                let frame = frame?;
                if let Some(generation) = fleet.formed_by(&frame) {
                    let form = &generation.form;
                    to_send.push(ToCoordinator::Credit { generation: form.generation, batches: 8 });
                    to_send.push(ToCoordinator::Connected { generation: form.generation });
                    if generation.connected.fetch_add(1, Ordering::AcqRel) + 1 == form.members.len() {
                        fleet.formed.send_replace(form.generation);
                    }
                    let done = generation.done.subscribe();
                    let step = form.step;
                    held = Some(step);
                    place = Some(Place { generation, step, batches: 0, is_done: false, done });
                } else {
                    match decode::<ToWorker>(frame.freeze())? {

                        Frame::Message(ToWorker::Pause { generation }) => {
                            if let Some(place) = place.as_ref().filter(|place| place.generation.form.generation == generation) {
                                place.generation.pauses.store(true, Ordering::Release);
                            }
                        }
                        Frame::Message(ToWorker::Abort { generation }) => {
                            if place.as_ref().is_some_and(|place| place.generation.form.generation == generation) {
                                place = None;
                                let state = held.map(|step| HeldState { step, owes_evaluation: false });
                                to_send.push(ToCoordinator::Stopped { generation, state, why: Stop::Aborted });
                            }
                        }
                        Frame::Message(ToWorker::Goodbye(_)) => return Ok(()),
                        Frame::Bulk(header, _) => {
                            if let Some(place) = place.as_mut()
                                && header.kind == BulkKind::Batch
                                && header.generation == place.generation.form.generation
                            {
                                place.batches += 1;
                            }
                        }
                        Frame::Message(_) => {}
                    }
                }
            }
            _ = stepped => {
                if let (Some(place), Some(done)) = (&mut place, done) {
                    place.done = done;
                }
            }
            _ = allowed.changed() => {}
            _ = signs_of_life.tick() => to_send.push(alive(place.as_ref().map_or(0, |place| place.generation.form.generation))),
        }
        if let Some(here) = &mut place {
            let generation = here.generation.form.generation;
            if here.is_done && *here.done.borrow() > here.step {
                (here.step, here.is_done) = (here.step + 1, false);
                here.batches -= 1;
                held = Some(here.step);
                to_send.push(report(generation, here.step));
                to_send.push(ToCoordinator::Credit { generation, batches: 1 });
                if here.generation.pauses.load(Ordering::Acquire) {
                    let state = held.map(|step| HeldState { step, owes_evaluation: false });
                    to_send.push(ToCoordinator::Stopped { generation, state, why: Stop::Paused });
                    place = None;
                }
            }
        }
        if let Some(here) = &mut place
            && !here.is_done
            && here.batches > 0
            && here.step < *allowed.borrow_and_update()
        {
            here.is_done = true;
            let all = here.generation.form.members.len() as u64;
            let parts = here.generation.parts.fetch_add(1, Ordering::AcqRel) + 1;
            if parts.is_multiple_of(all) {
                here.generation.done.send_replace(here.step + 1);
            }
        }
        for message in &to_send {
            frames.feed(encode_message(message)).await?;
        }
        if !to_send.is_empty() {
            SinkExt::<bytes::Bytes>::flush(&mut frames).await?;
        }
    }
}

/// Its thread waits for the others.
fn alive(generation: u64) -> ToCoordinator {
    ToCoordinator::Alive(Position {
        generation,
        phase: Phase::Reduce,
        step: 0,
        waits: true,
        for_ms: 0,
        longest_ms: None,
        operations: 0,
        bytes: 0,
        waits_for: None,
    })
}

fn report(generation: u64, step: u64) -> ToCoordinator {
    let rows = u64::from(SHARDS);
    ToCoordinator::Step(StepReport {
        generation,
        step,
        sums: StepSums { loss: rows as f64, weight: rows, rows, ..StepSums::default() },
        gradient_norm: 1.0,
        learning_rate: 0.001,
        control: ControlState::default(),
        seconds: PhaseSeconds { data: 0.0, compute: 0.1, reduce: 0.0, update: 0.0 },
    })
}

/// Prints the row of one size.
async fn measure(workers: u32, steps: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let coordinator = Coordinator::start(folder.path(), workers)?;
    let ready = folder.path().join("ready");
    let control: SocketAddr = loop {
        let text = std::fs::read_to_string(&ready).unwrap_or_default();
        if let Some(address) = text.lines().find_map(|line| line.strip_prefix("control=")) {
            break address.parse()?;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let cpu_before = coordinator.cpu_when_quiet().await;
    let fleet = Arc::new(Fleet {
        generation: Mutex::new(None),
        formed: watch::channel(0).0,
        allowed: watch::channel(0).0,
        joined: watch::channel(0).0,
        connecting: Semaphore::new(CONNECTING),
    });
    let started = Instant::now();
    let tasks: Vec<_> =
        (0..workers).map(|number| tokio::spawn(live(fleet.clone(), control, number))).collect();
    fleet.joined.subscribe().wait_for(|joined| *joined == workers).await?;
    let joined = started.elapsed();
    fleet.formed.subscribe().wait_for(|generation| *generation > 0).await?;
    let formed = started.elapsed() - joined;
    let cpu_formed = coordinator.cpu_when_quiet().await;

    let first = fleet.newest();
    fleet.allowed.send_replace(WARM_STEPS);
    first.done.subscribe().wait_for(|done| *done == WARM_STEPS).await?;
    let cpu_warm = coordinator.cpu_when_quiet().await;
    fleet.allowed.send_replace(WARM_STEPS + steps);
    first.done.subscribe().wait_for(|done| *done == WARM_STEPS + steps).await?;
    let cpu_stepped = coordinator.cpu_when_quiet().await;

    tokio::time::sleep(Duration::from_secs(5)).await;
    let cpu_idle = coordinator.cpu_seconds() - cpu_stepped;
    let (rss, cpu_alive) = (coordinator.mib("VmRSS"), coordinator.cpu_seconds());

    let lost = Instant::now();
    tasks.iter().step_by(10).for_each(|task| task.abort());
    fleet.allowed.send_replace(WARM_STEPS + steps + 1);
    let survivors = workers as usize - workers.div_ceil(10) as usize;
    let is_formed = |_: &u64| {
        let newest = fleet.newest();
        newest.form.members.len() == survivors && newest.connected.load(Ordering::Acquire) == survivors
    };
    fleet.formed.subscribe().wait_for(is_formed).await?;
    let (again, reformed) = (fleet.newest(), lost.elapsed());
    again.done.subscribe().wait_for(|done| *done == WARM_STEPS + steps + 1).await?;
    let stepped = lost.elapsed();
    let cpu_reformed = coordinator.cpu_when_quiet().await;
    println!(
        "| {workers} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} | {rss:.0} | {:.0} | {:.0} |",
        joined.as_secs_f64(),
        cpu_formed - cpu_before,
        formed.as_secs_f64(),
        1000.0 * (cpu_stepped - cpu_warm) / steps as f64,
        100.0 * cpu_idle / 5.0,
        reformed.as_secs_f64(),
        stepped.as_secs_f64(),
        cpu_reformed - cpu_alive,
        coordinator.mib("VmHWM"),
        first.frame.len() as f64 / 1024.0,
    );
    drop(coordinator);
    Ok(())
}
