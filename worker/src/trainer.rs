//! Device and state, and how they take part in a generation.

use std::net::TcpListener;
use std::sync::Arc;

use failpoints::{Point, reach};
use model::device::Device;
use protocol::activity::Phase;
use protocol::handshake::Token;
use protocol::layout::StateLayout;
use protocol::message::{Form, Generation as Number, StateSource, Stop, ToCoordinator, Welcome};
use transport::Tls;

use crate::abort::Abort;
use crate::collective::mesh::{FORM_LIMIT, Mesh, MeshError, Place};
use crate::collective::tcp::{SILENCE_LIMIT, TcpCollective};
use crate::collective::{Choice, Collective, CollectiveError, choose};
use crate::feed::{Feed, FeedClosed};
use crate::metrics::WorkerMetrics;
use crate::outbox::Outbox;
use crate::replica::Replica;
use crate::train::{Generation, StepError};

/// Owned by the training thread while it runs, by the session otherwise.
pub(crate) struct Trainer<D: Device> {
    pub(crate) device: D,
    /// The state after the last finished step; `None` before the first generation.
    pub(crate) replica: Option<Replica<D>>,
    /// The last generation it belonged to.
    pub(crate) generation: Number,
    /// How its gradients are to travel.
    collective: Choice,
}

/// One generation's work.
pub(crate) struct Task {
    pub(crate) form: Form,
    pub(crate) rank: u32,
    /// The state to start from, if the coordinator streamed one.
    pub(crate) image: Option<Vec<u8>>,
    pub(crate) welcome: Arc<Welcome>,
    pub(crate) layout: StateLayout,
    pub(crate) token: Token,
    pub(crate) tls: Option<Tls>,
    pub(crate) data_listener: Arc<TcpListener>,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) abort: Abort,
    pub(crate) feed: Feed,
    pub(crate) outbox: Outbox,
}

impl<D: Device + 'static> Trainer<D> {
    pub(crate) fn new(device: D, collective: Choice) -> Self {
        Self { device, replica: None, generation: 0, collective }
    }

    /// Connects to the peers and trains until the generation ends. Whatever happens, the replica is in the state
    /// after some whole step.
    ///
    /// # Errors
    /// What only this worker knows about, in words for the user. Lost peers are the coordinator's affair.
    pub(crate) fn work(&mut self, task: Task) -> Result<Stop, String> {
        let (tracer, step) = (task.outbox.tracer().clone(), task.form.step);
        let outcome = self.take_part(task);
        tracer.enter(Phase::Idle, self.replica.as_ref().map_or(step, |replica| replica.progress.step));
        outcome
    }

    fn take_part(&mut self, task: Task) -> Result<Stop, String> {
        let Task {
            form,
            rank,
            image,
            welcome,
            layout,
            token,
            tls,
            data_listener,
            metrics,
            abort,
            feed,
            outbox,
        } = task;
        self.generation = form.generation;
        let (device, job) = (&mut self.device, &welcome.job);
        metrics.shards(form.members[rank as usize].shards.len());

        reach(Point::Recovery, form.step);
        let place = Place { generation: form.generation, rank, members: form.members.clone() };
        let mesh = match Mesh::connect(&data_listener, &token, tls, place, FORM_LIMIT, abort.flag()) {
            Ok(mesh) => mesh,
            Err(MeshError::Aborted) => return Ok(Stop::Aborted),
            Err(error @ MeshError::Missing { .. }) => return Ok(Stop::Broken(error.to_string())),
            Err(error @ MeshError::Listener(_)) => return Err(error.to_string()),
        };
        let tcp = TcpCollective::new(mesh, SILENCE_LIMIT, metrics.data_plane())
            .map_err(|error| format!("cannot start the threads of the data plane: {error}"))?;
        abort.attach(Collective::<D>::abort_handle(&tcp));
        let mut collective = match choose(tcp, device, self.collective) {
            Ok(collective) => collective?,
            Err(error) => return stopped_by(error.into()),
        };
        abort.attach(collective.abort_handle());
        let replica = match (image, form.state, self.replica.take()) {
            (Some(image), _, _) => Replica::from_image(device, layout, &image),
            (None, StateSource::Initial, _) => Replica::initial(device, layout, job),
            (None, StateSource::Kept, Some(kept)) => Ok(kept),
            (None, StateSource::Member(source), kept) => {
                // One of the same step differs in nothing but what arrives last.
                let stays_whole = kept.as_ref().is_some_and(|kept| kept.progress.step == form.step);
                let own = kept.map_or_else(|| Replica::zeros(device, layout), Ok);
                let mut own = own.map_err(|error| error.to_string())?;
                outbox.tracer().enter(Phase::Transfer, form.step);
                reach(Point::StateTransfer, form.step);
                if let Err(error) = own.become_that_of(source, device, &mut *collective) {
                    // Until it has ended, something may arrive.
                    drop(collective);
                    self.replica = Some(own).filter(|_| stays_whole);
                    return stopped_by(error.into());
                }
                Ok(own)
            }
            (None, StateSource::Kept | StateSource::Coordinator, _) => {
                return Err("there is no state to start the generation from".to_owned());
            }
        };
        let replica = self.replica.insert(replica.map_err(|error| error.to_string())?);
        outbox.send(ToCoordinator::Connected { generation: form.generation });

        let links = (collective, feed, outbox);
        let mut generation =
            Generation::new((form, rank), job.clone(), welcome.data.clone(), device, replica, links)
                .map_err(|error| error.to_string())?
                .with_sample(welcome.sample.clone());
        generation.train(device, replica).or_else(stopped_by)
    }
}

/// What it means for the worker that something ended its training.
fn stopped_by(error: StepError) -> Result<Stop, String> {
    match error {
        StepError::Collective(CollectiveError::Aborted) | StepError::Feed(FeedClosed::Ended) => {
            Ok(Stop::Aborted)
        }
        StepError::Collective(CollectiveError::Device(error)) => Err(error.to_string()),
        StepError::Collective(cause) => Ok(Stop::Broken(cause.to_string())),
        other => Err(other.to_string()),
    }
}
