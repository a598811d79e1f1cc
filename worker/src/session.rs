//! A worker's life: connect, say hello, train in one generation after another, until the coordinator says goodbye.
//!
//! One task owns the connection; one blocking thread owns device and state while it trains. They meet in a
//! [`Feed`] (batches in), an [`Outbox`] (frames out) and an abort handle.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use failpoints::{Point, reach};
use model::device::Backend;
use protocol::activity::Phase;
use protocol::batch::Batch;
use protocol::frame::{BulkHeader, BulkKind, Frame};
use protocol::handshake::Token;
use protocol::layout::StateLayout;
use protocol::message::{
    Form, Goodbye, HeldState, Hello, StateSource, Stop, ToCoordinator, ToWorker, Welcome,
};
use protocol::problem::{Exit, Problem};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::abort::Abort;
use crate::collective::Choice;
use crate::connection::{Connection, lost};
use crate::feed::{BATCHES_AHEAD, Feed};
use crate::metrics::{self, Overhead, WorkerMetrics};
use crate::outbox::Outbox;
use crate::replica::Replica;
use crate::trace::Tracer;
use crate::trainer::{Task, Trainer};

/// How often a worker says that it lives.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(1);

/// A phase in which the training thread stays for so long is worth a trace.
const SLOW_AFTER: Duration = Duration::from_secs(3);

/// What a worker is told at its start; everything else comes from the coordinator.
#[derive(Debug, Clone)]
pub struct Config {
    /// `HOST:PORT` of the coordinator's control port.
    pub coordinator: String,
    /// Name for people.
    pub name: String,
    /// The run's secret.
    pub token: Token,
    /// Host that other workers reach this one at, if not the control connection's own address.
    pub advertise: Option<String>,
    /// Where to serve the worker's own metrics; nowhere if not given.
    pub metrics: Option<SocketAddr>,
    /// How gradients are to travel.
    pub collective: Choice,
    /// What this binary is.
    pub build: String,
}

/// Runs a worker to the end of the run. A value from `shutdown` makes a training worker ask the whole fleet to stop
/// after a step; a second one, or one to a worker that does not train, ends it at once.
///
/// # Errors
/// Whatever ended the run for this worker, as a sentence for the user.
pub async fn run<B>(
    config: Config,
    backend: B,
    mut shutdown: tokio::sync::mpsc::Receiver<()>,
) -> Result<Exit, Problem>
where
    B: Backend + 'static,
    B::Device: 'static,
{
    let mut connection = tokio::select! {
        connection = Connection::open(&config.coordinator, &config.token) => connection?,
        _ = shutdown.recv() => return Ok(Exit::Requeue),
    };
    let host = connection.local();
    let data_listener = TcpListener::bind((host, 0))
        .map_err(|e| Problem::failed(format!("cannot listen for other workers on {host}: {e}")))?;
    let data_port = data_listener.local_addr().map_err(|e| lost(&e.to_string()))?.port();
    let metrics = WorkerMetrics::new();
    let metrics_address = match config.metrics {
        Some(address) => Some(metrics::serve(address, metrics.clone()).await?),
        None => None,
    };
    let hello = Hello {
        name: config.name.clone(),
        build: config.build.clone(),
        device: backend.describe(),
        bits: backend.bits(),
        threads: backend.threads() as u32,
        data_port,
        advertise: config.advertise.clone(),
        metrics: metrics_address.map(|address| reachable(address, host)),
    };
    hello.check()?;
    connection.send(&ToCoordinator::Hello(hello)).await?;
    let first = tokio::select! {
        frame = connection.receive() => frame.unwrap_or_else(|| Err(lost("it closed the connection")))?,
        _ = shutdown.recv() => return Ok(Exit::Requeue),
    };
    let welcome = match first {
        Frame::Message(ToWorker::Welcome(welcome)) => *welcome,
        Frame::Message(ToWorker::Goodbye(goodbye)) => return ended(goodbye),
        _ => return Err(lost("it began with something else than a welcome")),
    };
    let layout = StateLayout::new(welcome.data.model.clone(), welcome.job.batch_size as usize);
    let mut opened = tokio::task::spawn_blocking({
        let (layout, welcome) = (layout.clone(), welcome.clone());
        move || backend.open(&layout, &welcome.job, &welcome.data, welcome.run.recompute)
    });
    let mut signs_of_life = signs_of_life();
    let opening = Tracer::new(metrics.data_plane());
    let device = loop {
        tokio::select! {
            device = &mut opened => break device.expect("opening a device does not panic"),
            _ = signs_of_life.tick() => connection.send(&ToCoordinator::Alive(opening.position())).await?,
        }
    };
    let device = device.map_err(|error| Problem::failed(error.to_string()))?;
    let (frames, outgoing) = unbounded_channel();
    let outbox = Outbox::new(frames, metrics.clone(), welcome.data.schedule, welcome.run.digest_steps);
    let session = Session {
        connection,
        outgoing,
        outbox,
        layout,
        welcome: Arc::new(welcome),
        token: config.token,
        data_listener: Arc::new(data_listener),
        metrics,
        stage: Stage::Idle(Box::new(Trainer::new(device, config.collective))),
        waiting_for_state: None,
        has_told: false,
    };
    session.serve(shutdown).await
}

/// When a worker says that it lives.
fn signs_of_life() -> tokio::time::Interval {
    let mut interval = tokio::time::interval(SIGN_OF_LIFE_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Where others find what listens at `bound`: an unspecified address means every one of this host's.
fn reachable(mut bound: SocketAddr, host: IpAddr) -> String {
    if bound.ip().is_unspecified() {
        bound.set_ip(host);
    }
    bound.to_string()
}

fn ended(goodbye: Goodbye) -> Result<Exit, Problem> {
    match goodbye {
        Goodbye::Done => Ok(Exit::Done),
        Goodbye::Requeue => Ok(Exit::Requeue),
        Goodbye::Failed(sentence) => Err(Problem::failed(sentence)),
    }
}

/// What the training thread hands back: the state, and why it stopped.
type Worked<D> = (Box<Trainer<D>>, Result<Stop, String>);

/// Whether the training thread runs.
enum Stage<D: model::device::Device> {
    Idle(Box<Trainer<D>>),
    Training(Running<D>),
    /// Only while changing from one to the other.
    Between,
}

struct Running<D: model::device::Device> {
    generation: u64,
    /// Dropped by an abort, which ends a thread that waits for a batch.
    batches: Option<SyncSender<Batch>>,
    abort: Abort,
    thread: JoinHandle<Worked<D>>,
}

impl<D: model::device::Device> Running<D> {
    /// Ends the thread, whatever it waits for.
    fn end(&mut self) {
        self.batches = None;
        self.abort.abort();
    }
}

struct Session<D: model::device::Device> {
    connection: Connection,
    outgoing: UnboundedReceiver<Bytes>,
    outbox: Outbox,
    layout: StateLayout,
    welcome: Arc<Welcome>,
    token: Token,
    data_listener: Arc<TcpListener>,
    metrics: WorkerMetrics,
    stage: Stage<D>,
    /// A generation that starts when the rest of its state has arrived.
    waiting_for_state: Option<(Form, Vec<u8>)>,
    /// The training thread has not moved for a while, and the coordinator knows what it did before.
    has_told: bool,
}

impl<D: model::device::Device + 'static> Session<D> {
    async fn serve(mut self, shutdown: tokio::sync::mpsc::Receiver<()>) -> Result<Exit, Problem> {
        let result = self.obey_all(shutdown).await;
        // The thread must not outlive the session; the process waits a little for it.
        if let Stage::Training(running) = &mut self.stage {
            running.end();
        }
        result
    }

    async fn obey_all(&mut self, mut shutdown: tokio::sync::mpsc::Receiver<()>) -> Result<Exit, Problem> {
        let mut signs_of_life = signs_of_life();
        let mut was_asked_to_stop = false;
        loop {
            tokio::select! {
                frame = self.connection.receive() => match frame {
                    Some(Ok(Frame::Message(ToWorker::Goodbye(goodbye)))) => return ended(goodbye),
                    Some(Ok(Frame::Message(message))) => self.obey(message)?,
                    Some(Ok(Frame::Bulk(header, payload))) => self.take_in(&header, &payload)?,
                    Some(Err(problem)) => return Err(problem),
                    None => return Err(lost("it closed the connection")),
                },
                Some(frame) = self.outgoing.recv() => self.connection.send_frame(frame).await?,
                _ = signs_of_life.tick() => self.say_where().await?,
                finished = finished(&mut self.stage) => self.rest(finished)?,
                Some(()) = shutdown.recv() => match &self.stage {
                    Stage::Training(_) if !was_asked_to_stop => {
                        was_asked_to_stop = true;
                        self.outbox.request_drain();
                    }
                    _ => return Ok(Exit::Requeue),
                },
            }
        }
    }

    /// Says what the training thread is doing; once in a phase in which it stays long, also what it did before.
    async fn say_where(&mut self) -> Result<(), Problem> {
        let started = Instant::now();
        let position = self.outbox.tracer().position();
        let is_slow = position.phase != Phase::Idle && position.for_ms >= SLOW_AFTER.as_millis() as u32;
        if is_slow && !self.has_told {
            self.outbox.send(ToCoordinator::Trace(self.outbox.tracer().trace()));
        }
        self.has_told = is_slow;
        self.connection.send(&ToCoordinator::Alive(position)).await?;
        self.metrics.overhead(Overhead::SignsOfLife, started.elapsed());
        Ok(())
    }

    fn obey(&mut self, message: ToWorker) -> Result<(), Problem> {
        match message {
            ToWorker::Form(form) if form.state == StateSource::Coordinator => {
                let image = Vec::with_capacity(self.layout.image_bytes());
                self.waiting_for_state = Some((form, image));
            }
            ToWorker::Form(form) => self.start(form, None)?,
            ToWorker::Drain => self.outbox.request_drain(),
            ToWorker::Pause { generation } => {
                reach(Point::Admission, self.outbox.steps_done());
                self.outbox.request_pause(generation);
            }
            ToWorker::Abort { generation } => {
                if let Stage::Training(running) = &mut self.stage
                    && running.generation == generation
                {
                    running.end();
                    self.outbox.send(ToCoordinator::Trace(self.outbox.tracer().trace()));
                }
            }
            ToWorker::SendState { at_step } => match &self.stage {
                Stage::Idle(trainer) => self.send_state(trainer)?,
                _ => self.outbox.request_state(at_step),
            },
            ToWorker::StandBy => tracing::info!("standing by"),
            ToWorker::Welcome(_) | ToWorker::Goodbye(_) => {
                return Err(lost("it sent a message out of place"));
            }
        }
        Ok(())
    }

    fn take_in(&mut self, header: &BulkHeader, payload: &Bytes) -> Result<(), Problem> {
        match header.kind {
            BulkKind::State => {
                let Some((form, mut image)) = self.waiting_for_state.take() else { return Ok(()) };
                if header.generation != form.generation || header.tag != image.len() as u64 {
                    return Err(lost("it sent a state in the wrong order"));
                }
                image.extend_from_slice(payload);
                if image.len() < self.layout.image_bytes() {
                    self.waiting_for_state = Some((form, image));
                    return Ok(());
                }
                self.start(form, Some(image))
            }
            BulkKind::Batch => {
                let Stage::Training(running) = &self.stage else { return Ok(()) };
                if header.generation != running.generation {
                    return Ok(());
                }
                let batch = Batch::from_bytes(payload, &self.welcome.data)
                    .ok_or_else(|| lost("it sent a batch that does not fit the job"))?;
                // The window bounds what is under way, so there is always room; a thread that has ended reads
                // no more, which its own result explains.
                if let Some(batches) = &running.batches {
                    // Counted first, or the thread might take it before.
                    self.outbox.tracer().batch_came();
                    let _ = batches.try_send(batch);
                }
                Ok(())
            }
            BulkKind::Reduce | BulkKind::Gather => Err(lost("it sent data of the workers' own plane")),
        }
    }

    /// Starts the training thread of a generation.
    fn start(&mut self, form: Form, image: Option<Vec<u8>>) -> Result<(), Problem> {
        let Stage::Idle(mut trainer) = std::mem::replace(&mut self.stage, Stage::Between) else {
            return Err(lost("it formed a generation while another one runs"));
        };
        let Some(rank) = form.rank_of(self.welcome.worker_id) else {
            return Err(lost("it formed a generation without this worker"));
        };
        self.outbox.begin_generation(form.generation, form.step);
        let (batches, received) = sync_channel(2 * BATCHES_AHEAD as usize);
        let abort = Abort::default();
        let generation = form.generation;
        let feed = Feed::new(received, generation, self.outbox.clone());
        let task = Task {
            form,
            rank,
            image,
            welcome: self.welcome.clone(),
            layout: self.layout.clone(),
            token: self.token.clone(),
            data_listener: self.data_listener.clone(),
            metrics: self.metrics.clone(),
            abort: abort.clone(),
            feed,
            outbox: self.outbox.clone(),
        };
        let thread = tokio::task::spawn_blocking(move || {
            let outcome = trainer.work(task);
            (trainer, outcome)
        });
        self.stage = Stage::Training(Running { generation, batches: Some(batches), abort, thread });
        Ok(())
    }

    /// The training thread has ended: says so, and waits for what comes next.
    fn rest(&mut self, (trainer, outcome): Worked<D>) -> Result<(), Problem> {
        let why = match outcome {
            Ok(why) => {
                if let Stop::Broken(_) = why {
                    self.outbox.send(ToCoordinator::Trace(self.outbox.tracer().trace()));
                }
                // Members that were cut off at different points of an evaluation differ, and may.
                if let Some(replica) = trainer.replica.as_ref().filter(|replica| !replica.owes_evaluation()) {
                    let sent = self.outbox.send_digest(&trainer.device, replica, trainer.generation);
                    sent.map_err(|error| Problem::failed(error.to_string()))?;
                }
                why
            }
            Err(sentence) => {
                self.outbox.send(ToCoordinator::Failed { sentence, hint: None });
                Stop::Aborted
            }
        };
        let schedule = self.welcome.data.schedule;
        let held = |replica: &Replica<D>| {
            let step = replica.progress.step;
            // That at the end of a run which ends within an epoch is in no control state; who has done it has finished.
            let owes_last =
                why != Stop::Finished && schedule.evaluates_after(step) && !schedule.ends_epoch(step);
            HeldState { step, owes_evaluation: replica.owes_evaluation() || owes_last }
        };
        let state = trainer.replica.as_ref().map(held);
        self.outbox.send(ToCoordinator::Stopped { generation: trainer.generation, state, why });
        self.stage = Stage::Idle(trainer);
        Ok(())
    }

    fn send_state(&self, trainer: &Trainer<D>) -> Result<(), Problem> {
        let Some(replica) = &trainer.replica else { return Ok(()) };
        self.outbox
            .send_state(&trainer.device, replica, trainer.generation)
            .map_err(|e| Problem::failed(e.to_string()))
    }
}

/// Waits for the end of the training thread, for ever if none runs. Safe to cancel.
async fn finished<D: model::device::Device>(stage: &mut Stage<D>) -> Worked<D> {
    match stage {
        Stage::Training(running) => (&mut running.thread).await.expect("the training thread does not panic"),
        _ => std::future::pending().await,
    }
}
