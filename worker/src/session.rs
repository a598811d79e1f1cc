//! A worker's life: connect, say hello, train in one generation after another, until the coordinator says goodbye. A
//! coordinator that is lost without one is looked for ([`away`]); the training thread goes on meanwhile.
//!
//! One task owns the connection; one blocking thread owns device and state while it trains. They meet in a
//! [`Feed`] (batches in), an [`Outbox`] (frames out) and an abort handle.

mod away;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use failpoints::{Point, reach};
use model::device::Backend;
use protocol::activity::Phase;
use protocol::batch::Batch;
use protocol::frame::{BulkHeader, BulkKind, Frame};
use protocol::handshake::{self, Token};
use protocol::layout::StateLayout;
use protocol::message::{
    Form, Goodbye, HeldState, Hello, StateSource, Stop, ToCoordinator, ToWorker, Welcome,
};
use protocol::problem::{Exit, Problem};
use protocol::schedule::Work;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use transport::Tls;

use crate::abort::Abort;
use crate::collective::Choice;
use crate::connection::{Broken, CONNECT_PATIENCE, Connection, lost};
use crate::feed::{BATCHES_AHEAD, Feed};
use crate::metrics::{self, Overhead, WorkerMetrics};
use crate::outbox::{Outbox, Outgoing};
use crate::reports::Reports;
use crate::trace::Tracer;
use crate::trainer::{Task, Trainer};

/// How often a worker says that it lives.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(1);

/// A phase in which the training thread stays for so long is worth a trace.
const SLOW_AFTER: Duration = Duration::from_secs(3);
/// Before a coordinator that has closed the connection without a word is greeted again.
const GREETING_PAUSE: Duration = Duration::from_millis(200);

/// What a worker is told at its start; everything else comes from the coordinator.
#[derive(Debug, Clone)]
pub struct Config {
    /// `HOST:PORT` of the coordinator's control port.
    pub coordinator: String,
    /// Name for people.
    pub name: String,
    /// The run's secret.
    pub token: Token,
    /// The run's certificate, if what its processes say to each other is encrypted.
    pub tls: Option<Tls>,
    /// Host that other workers reach this one at, if not the control connection's own address.
    pub advertise: Option<String>,
    /// Where to serve the worker's own metrics; nowhere if not given.
    pub metrics: Option<SocketAddr>,
    /// How gradients are to travel.
    pub collective: Choice,
    /// How long it keeps what it holds when it has lost its coordinator; the run's own time if not given.
    pub park_timeout: Option<Duration>,
    /// What this binary is.
    pub build: String,
}

/// Runs a worker to the end of the run. A value from `shutdown` makes a training worker ask the whole fleet to stop
/// after a step; a second one, or one to a worker that does not train or has no coordinator, ends it at once.
///
/// # Errors
/// Whatever ended the run for this worker, as a sentence for the user.
pub async fn run<B>(config: Config, mut backend: B, mut shutdown: Receiver<()>) -> Result<Exit, Problem>
where
    B: Backend + 'static,
    B::Device: 'static,
{
    let connection = tokio::select! {
        connection = Connection::open(&config.coordinator, &config.token, config.tls.as_ref()) => connection?,
        _ = shutdown.recv() => return Ok(Exit::Requeue),
    };
    let host = connection.local();
    let data_listener = TcpListener::bind((host, 0))
        .map_err(|e| Problem::failed(format!("cannot listen for other workers on {host}: {e}")))?;
    let data_port = data_listener.local_addr().map_err(|e| lost(&e.to_string()))?.port();
    let data_listener = Arc::new(data_listener);
    let metrics = WorkerMetrics::new();
    let metrics_address = match config.metrics {
        Some(address) => Some(metrics::serve(address, metrics.clone()).await?),
        None => None,
    };
    let incarnation = handshake::incarnation()
        .map_err(|e| Problem::failed(format!("the system has no randomness to tell processes apart: {e}")))?;
    let hello = Hello {
        name: config.name.clone(),
        build: config.build.clone(),
        device: backend.describe(),
        bits: backend.bits(),
        threads: backend.threads() as u32,
        data_port,
        advertise: config.advertise.clone(),
        metrics: metrics_address.map(|address| reachable(address, host)),
        incarnation,
        held: None,
    };
    hello.check()?;
    let mut greeted = tokio::select! {
        greeted = first_greeting(connection, &config, &hello) => greeted?,
        _ = shutdown.recv() => return Ok(Exit::Requeue),
    };
    loop {
        let (mut connection, welcome) = match greeted {
            Greeted::Welcome(connection, welcome) => (connection, welcome),
            Greeted::Goodbye(goodbye) => return ended(goodbye),
        };
        let layout = StateLayout::new(welcome.data.model.clone(), welcome.job.batch_size as usize);
        let mut opened = tokio::task::spawn_blocking({
            let (layout, welcome) = (layout.clone(), welcome.clone());
            move || {
                reach(Point::Open, 0);
                let device = backend.open(&layout, &welcome.job, &welcome.data, welcome.run.recompute);
                (backend, device)
            }
        });
        let mut signs_of_life = signs_of_life();
        let opening = Tracer::new(metrics.data_plane());
        let (again, device) = loop {
            tokio::select! {
                device = &mut opened => break device.expect("opening a device does not panic"),
                // A driver may take its time. There is nothing to lose yet.
                _ = shutdown.recv() => return Ok(Exit::Requeue),
                // A coordinator that is gone meanwhile is looked for when the device is open.
                _ = signs_of_life.tick() => {
                    let _ = connection.send(&ToCoordinator::Alive(opening.position())).await;
                }
            }
        };
        backend = again;
        let device = device.map_err(|error| Problem::failed(error.to_string()))?;
        let (queue, outgoing) = unbounded_channel();
        let outbox = Outbox::new(queue, metrics.clone(), welcome.data.schedule, welcome.run.digest_steps);
        let session = Session {
            config: config.clone(),
            hello: hello.clone(),
            connection,
            outgoing,
            outbox,
            reports: Reports::new(),
            layout,
            welcome: Arc::new(*welcome),
            data_listener: data_listener.clone(),
            metrics: metrics.clone(),
            stage: Stage::Idle(Box::new(Trainer::new(device, config.collective))),
            next: None,
            has_told: false,
        };
        greeted = match session.serve(&mut shutdown).await? {
            End::Over(exit) => return Ok(exit),
            End::Anew(connection, welcome) => Greeted::Welcome(*connection, welcome),
        };
    }
}

/// What a coordinator answers to a hello.
enum Greeted {
    Welcome(Connection, Box<Welcome>),
    Goodbye(Goodbye),
}

/// Says hello.
async fn greet(mut connection: Connection, hello: Hello) -> Result<Greeted, Broken> {
    connection.send(&ToCoordinator::Hello(hello)).await?;
    match connection.receive().await? {
        Frame::Message(ToWorker::Welcome(welcome)) => Ok(Greeted::Welcome(connection, welcome)),
        Frame::Message(ToWorker::Goodbye(goodbye)) => Ok(Greeted::Goodbye(goodbye)),
        _ => Err(Broken::Senseless(lost("it began with something else than a welcome"))),
    }
}

/// The same to the first coordinator; one that is lost before it has answered may be on its way back.
async fn first_greeting(
    mut connection: Connection,
    config: &Config,
    hello: &Hello,
) -> Result<Greeted, Problem> {
    let patience = Instant::now() + CONNECT_PATIENCE;
    loop {
        match greet(connection, hello.clone()).await {
            Ok(greeted) => return Ok(greeted),
            Err(Broken::Lost(_)) if Instant::now() < patience => {}
            Err(broken) => return Err(broken.into()),
        }
        tokio::time::sleep(GREETING_PAUSE).await;
        connection = Connection::open(&config.coordinator, &config.token, config.tls.as_ref()).await?;
    }
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
        Goodbye::Final(sentence) => Err(Problem::for_good(sentence)),
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
    rank: u32,
    shards: Range<u32>,
    /// The work whose batch comes next.
    next: Option<Work>,
    /// Batches that the coordinator may send.
    window: u32,
    /// The connections to all peers stand.
    is_connected: bool,
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
    config: Config,
    /// Who this worker is.
    hello: Hello,
    connection: Connection,
    outgoing: UnboundedReceiver<Outgoing>,
    outbox: Outbox,
    /// What the coordinator may have to be told again.
    reports: Reports,
    layout: StateLayout,
    welcome: Arc<Welcome>,
    data_listener: Arc<TcpListener>,
    metrics: WorkerMetrics,
    stage: Stage<D>,
    /// The generation that starts when its state is here and the last one has ended.
    next: Option<Next>,
    /// The training thread has not moved for a while, and the coordinator knows what it did before.
    has_told: bool,
}

/// A generation that is to start.
struct Next {
    form: Form,
    rank: u32,
    /// As much of the state as has arrived, if the coordinator sends it.
    image: Option<Vec<u8>>,
    /// It was given up before it began.
    is_over: bool,
}

/// How a session ends.
enum End {
    Over(Exit),
    /// The coordinator that came back does not go on with what this worker was told.
    Anew(Box<Connection>, Box<Welcome>),
}

impl<D: model::device::Device + 'static> Session<D> {
    async fn serve(mut self, shutdown: &mut Receiver<()>) -> Result<End, Problem> {
        let result = self.serve_all(shutdown).await;
        // The thread must not outlive the session; the process waits a little for it.
        if let Stage::Training(running) = &mut self.stage {
            running.end();
        }
        result
    }

    /// Serves one coordinator after another.
    async fn serve_all(&mut self, shutdown: &mut Receiver<()>) -> Result<End, Problem> {
        let mut was_asked_to_stop = false;
        loop {
            let cause = match self.obey_all(shutdown, &mut was_asked_to_stop).await {
                Ok(exit) => return Ok(End::Over(exit)),
                Err(Broken::Senseless(problem)) => return Err(problem),
                Err(Broken::Lost(cause)) => cause,
            };
            if was_asked_to_stop {
                return Ok(End::Over(Exit::Requeue));
            }
            if let Some(end) = self.away(&cause, shutdown).await? {
                return Ok(end);
            }
        }
    }

    async fn obey_all(
        &mut self,
        shutdown: &mut Receiver<()>,
        was_asked_to_stop: &mut bool,
    ) -> Result<Exit, Broken> {
        let mut signs_of_life = signs_of_life();
        loop {
            tokio::select! {
                frame = self.connection.receive() => match frame? {
                    Frame::Message(ToWorker::Goodbye(goodbye)) => return Ok(ended(goodbye)?),
                    Frame::Message(message) => self.obey(message)?,
                    Frame::Bulk(header, payload) => self.take_in(&header, &payload)?,
                },
                Some(outgoing) = self.outgoing.recv() => self.forward(outgoing).await?,
                _ = signs_of_life.tick() => self.say_where().await?,
                finished = finished(&mut self.stage) => self.rest(finished)?,
                Some(()) = shutdown.recv() => match &self.stage {
                    Stage::Training(_) if !*was_asked_to_stop => {
                        *was_asked_to_stop = true;
                        self.outbox.request_drain();
                    }
                    _ => return Ok(Exit::Requeue),
                },
            }
        }
    }

    /// Says what the training thread is doing; once in a phase in which it stays long, also what it did before.
    async fn say_where(&mut self) -> Result<(), Broken> {
        let started = Instant::now();
        let position = self.outbox.tracer().position();
        let is_slow = position.phase != Phase::Idle && position.for_ms >= SLOW_AFTER.as_millis() as u32;
        if is_slow && !self.has_told {
            self.outbox.send(ToCoordinator::Trace(self.outbox.tracer().trace()));
        }
        self.has_told = is_slow;
        self.tell_profile(false);
        self.connection.send(&ToCoordinator::Alive(position)).await?;
        self.metrics.overhead(Overhead::SignsOfLife, started.elapsed());
        Ok(())
    }

    /// Sends what a profile has of this worker: when it is complete, or as much as there is.
    fn tell_profile(&self, is_over: bool) {
        if let Some(profile) = self.outbox.tracer().take_profile(is_over) {
            self.outbox.send(ToCoordinator::Profile(profile));
        }
    }

    /// Sends what the training thread has to say.
    async fn forward(&mut self, outgoing: Outgoing) -> Result<(), Broken> {
        self.note(&outgoing);
        match outgoing {
            Outgoing::Message(message) => self.connection.send(&message).await,
            Outgoing::Bulk(frame) => self.connection.send_frame(frame).await,
            Outgoing::Begin(_) => Ok(()),
        }
    }

    /// Remembers what a coordinator that comes back must know.
    fn note(&mut self, outgoing: &Outgoing) {
        match (outgoing, &mut self.stage) {
            (Outgoing::Begin(step), _) => self.reports.begin(*step),
            (Outgoing::Bulk(_), _) => {}
            (Outgoing::Message(message), stage) => {
                self.reports.keep(message);
                let Stage::Training(running) = stage else { return };
                match message {
                    ToCoordinator::Credit { generation, batches } if *generation == running.generation => {
                        running.window += batches;
                    }
                    ToCoordinator::Connected { generation } if *generation == running.generation => {
                        running.is_connected = true;
                    }
                    _ => {}
                }
            }
        }
    }

    fn obey(&mut self, message: ToWorker) -> Result<(), Problem> {
        match message {
            ToWorker::Form(form) => {
                let image = (form.state == StateSource::Coordinator)
                    .then(|| Vec::with_capacity(self.layout.image_bytes()));
                let rank = form.rank_of(self.welcome.worker_id);
                let rank = rank.ok_or_else(|| lost("it formed a generation without this worker"))?;
                self.next = Some(Next { form, rank, image, is_over: false });
                // Of a generation that the coordinator has gone on without.
                self.end_training();
                self.start_next();
            }
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
                if let Some(next) = self.next.as_mut().filter(|next| next.form.generation == generation) {
                    next.is_over = true;
                    self.start_next();
                }
            }
            ToWorker::SendState { at_step } => match &self.stage {
                Stage::Idle(trainer) => self.send_state(trainer)?,
                _ => self.outbox.request_state(at_step),
            },
            ToWorker::StandBy => {
                tracing::info!("standing by");
                self.end_training();
            }
            ToWorker::Welcome(_) | ToWorker::Goodbye(_) => {
                return Err(lost("it sent a message out of place"));
            }
        }
        Ok(())
    }

    fn end_training(&mut self) {
        if let Stage::Training(running) = &mut self.stage {
            running.end();
        }
    }

    fn take_in(&mut self, header: &BulkHeader, payload: &Bytes) -> Result<(), Problem> {
        match header.kind {
            BulkKind::State => {
                let Some(Next { form, image: Some(image), .. }) = &mut self.next else { return Ok(()) };
                if header.generation != form.generation || header.tag != image.len() as u64 {
                    return Err(lost("it sent a state in the wrong order"));
                }
                image.extend_from_slice(payload);
                self.start_next();
                Ok(())
            }
            BulkKind::Batch => {
                let Stage::Training(running) = &mut self.stage else { return Ok(()) };
                if header.generation != running.generation {
                    return Ok(());
                }
                let batch = Batch::from_bytes(payload, &self.welcome.data)
                    .ok_or_else(|| lost("it sent a batch that does not fit the job"))?;
                running.next = self.welcome.data.schedule.from(batch.work).nth(1);
                running.window = running.window.saturating_sub(1);
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

    /// Starts the training thread of the next generation, if its state is here and the last thread has ended. One that is
    /// over it leaves without having begun: its members are not waited for.
    fn start_next(&mut self) {
        let is_here = |image: &Vec<u8>| image.len() >= self.layout.image_bytes();
        let may_begin = |next: &Next| next.is_over || next.image.as_ref().is_none_or(is_here);
        if !self.next.as_ref().is_some_and(may_begin) || !matches!(self.stage, Stage::Idle(_)) {
            return;
        }
        let (Some(Next { form, rank, image, is_over }), Stage::Idle(mut trainer)) =
            (self.next.take(), std::mem::replace(&mut self.stage, Stage::Between))
        else {
            unreachable!("both were looked at")
        };
        if is_over {
            let (generation, state) = (form.generation, self.held_state(&trainer, false));
            self.outbox.send(ToCoordinator::Stopped { generation, state, why: Stop::Aborted });
            self.stage = Stage::Idle(trainer);
            return;
        }
        self.outbox.begin_generation(form.generation, form.step, form.profile.clone());
        let (batches, received) = sync_channel(2 * BATCHES_AHEAD as usize);
        let abort = Abort::default();
        let generation = form.generation;
        let shards = form.members[rank as usize].shards.clone();
        let next = self.welcome.data.schedule.after(form.step, form.owes_evaluation).next();
        let feed = Feed::new(received, generation, self.outbox.clone());
        let task = Task {
            form,
            rank,
            image,
            welcome: self.welcome.clone(),
            layout: self.layout.clone(),
            token: self.config.token.clone(),
            tls: self.config.tls.clone(),
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
        self.stage = Stage::Training(Running {
            generation,
            rank,
            shards,
            next,
            window: 0,
            is_connected: false,
            batches: Some(batches),
            abort,
            thread,
        });
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
                self.outbox.send(ToCoordinator::Failed { sentence, hint: None, is_final: false });
                Stop::Aborted
            }
        };
        self.tell_profile(true);
        let state = self.held_state(&trainer, why == Stop::Finished);
        self.outbox.send(ToCoordinator::Stopped { generation: trainer.generation, state, why });
        self.stage = Stage::Idle(trainer);
        self.start_next();
        Ok(())
    }

    /// How far the state is that rests in a trainer.
    fn held_state(&self, trainer: &Trainer<D>, has_finished: bool) -> Option<HeldState> {
        let schedule = self.welcome.data.schedule;
        trainer.replica.as_ref().map(|replica| {
            let step = replica.progress.step;
            // That at the end of a run which ends within an epoch is in no control state; who has done it has finished.
            let owes_last = !has_finished && schedule.evaluates_after(step) && !schedule.ends_epoch(step);
            HeldState { step, owes_evaluation: replica.owes_evaluation() || owes_last }
        })
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
