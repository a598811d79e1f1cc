//! A worker without its coordinator: it goes on with what it holds, and looks for the coordinator.
//!
//! The training thread notices nothing before it lacks a batch; then it waits for one, with device, replica and
//! collective as they are. Peers that are lost meanwhile end its generation: it rests. What it has to say is kept in
//! [`Reports`](crate::reports::Reports) or follows from what it holds, which its next hello says.

use std::time::Duration;

use protocol::message::{Held, Hello, Holding, ToCoordinator, Welcome};
use protocol::problem::{Exit, Problem};
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

use super::{Config, End, Greeted, Session, Stage, ended, finished, greet};
use crate::connection::{Broken, Connection};

/// A coordinator that is back answers a hello within this time.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// After one that was found and lost again, this long passes before it is looked for.
const PAUSE: Duration = Duration::from_millis(250);

impl<D: model::device::Device + 'static> Session<D> {
    /// Holds on until a coordinator of this run is there; `None` if it has taken this worker back.
    pub(super) async fn away(
        &mut self,
        cause: &str,
        shutdown: &mut Receiver<()>,
    ) -> Result<Option<End>, Problem> {
        if let Some(goodbye) = self.connection.goodbye().await {
            return Ok(Some(End::Over(ended(goodbye)?)));
        }
        tracing::info!("lost the coordinator: {cause}");
        // Nobody will send the rest of it.
        self.next = None;
        self.outbox.forget_states();
        let limit = self.config.park_timeout.unwrap_or(self.welcome_park_timeout());
        let deadline = tokio::time::Instant::now() + limit;
        let Config { coordinator, token, tls, .. } = self.config.clone();
        let (mut cause, mut pause) = (cause.to_owned(), Duration::ZERO);
        loop {
            let paused = tokio::time::sleep(pause);
            let mut finding = std::pin::pin!(async {
                paused.await;
                Connection::find(&coordinator, &token, tls.as_ref()).await
            });
            let connection = loop {
                tokio::select! {
                    connection = &mut finding => break connection,
                    Some(outgoing) = self.outgoing.recv() => self.note(&outgoing),
                    finished = finished(&mut self.stage) => self.rest(finished)?,
                    () = tokio::time::sleep_until(deadline) => return Err(parked_too_long(limit, &cause)),
                    Some(()) = shutdown.recv() => return Ok(Some(End::Over(Exit::Requeue))),
                }
            };
            match self.come_back(connection).await {
                Ok(end) => return Ok(end),
                Err(Broken::Senseless(problem)) => return Err(problem),
                Err(Broken::Lost(again)) => (cause, pause) = (again, PAUSE),
            }
        }
    }

    /// Says hello to a coordinator, and takes up where the last one was lost.
    async fn come_back(&mut self, connection: Connection) -> Result<Option<End>, Broken> {
        // What the thread has said by now is in the hello; what it says from now on comes after it.
        while let Ok(outgoing) = self.outgoing.try_recv() {
            self.note(&outgoing);
        }
        let hello = Hello { held: self.held(), ..self.hello.clone() };
        let greeted = timeout(GREETING_LIMIT, greet(connection, hello)).await;
        let (mut connection, welcome) = match greeted.map_err(|_| no_answer())?? {
            Greeted::Welcome(connection, welcome) => (connection, welcome),
            Greeted::Goodbye(goodbye) => return Ok(Some(End::Over(ended(goodbye)?))),
        };
        self.check_run(&welcome)?;
        if !says_the_same(&self.welcome, &welcome) {
            return Ok(Some(End::Anew(Box::new(connection), welcome)));
        }
        for report in self.reports.since(welcome.on_record) {
            connection.send(report).await?;
        }
        if let Stage::Training(running) = &self.stage
            && running.is_connected
        {
            connection.send(&ToCoordinator::Connected { generation: running.generation }).await?;
        }
        (self.connection, self.welcome) = (connection, (*welcome).into());
        tracing::info!("the coordinator is back");
        Ok(None)
    }

    /// What this worker holds of the run; nothing if it never had a part in it.
    fn held(&self) -> Option<Held> {
        let (generation, holding) = match &self.stage {
            Stage::Training(running) => {
                let (rank, shards) = (running.rank, running.shards.clone());
                let (next, window) = (running.next, running.window);
                (running.generation, Holding::Place { rank, shards, next, window })
            }
            Stage::Idle(trainer) => (trainer.generation, Holding::State(self.held_state(trainer, false)?)),
            Stage::Between => return None,
        };
        let (run_id, reports_from) = (self.welcome.run_id.clone(), self.reports.from());
        Some(Held { run_id, generation, reports_from, holding })
    }

    /// Refuses a coordinator that is not this worker's, or no longer.
    fn check_run(&self, welcome: &Welcome) -> Result<(), Broken> {
        let ours = &self.welcome;
        if welcome.run_id != ours.run_id {
            let sentence = format!(
                "the coordinator at {} coordinates run {}, this worker works for {}",
                self.config.coordinator, welcome.run_id, ours.run_id
            );
            let hint = "start the worker again if that is what it is to work for";
            return Err(Broken::Senseless(Problem::failed(sentence).hint(hint)));
        }
        if welcome.coordinator_epoch < ours.coordinator_epoch {
            return Err(Broken::Lost(format!(
                "a coordinator of start {} of the run is there, start {} was there before",
                welcome.coordinator_epoch, ours.coordinator_epoch
            )));
        }
        Ok(())
    }

    fn welcome_park_timeout(&self) -> Duration {
        Duration::from_secs(self.welcome.park_timeout_seconds.into())
    }
}

/// Whether what was computed for one coordinator can be gone on with for the other.
fn says_the_same(one: &Welcome, other: &Welcome) -> bool {
    (&one.job, &one.run, &one.data, &one.sample) == (&other.job, &other.run, &other.data, &other.sample)
}

fn no_answer() -> Broken {
    Broken::Lost(format!("it did not answer a hello within {} s", GREETING_LIMIT.as_secs()))
}

fn parked_too_long(limit: Duration, cause: &str) -> Problem {
    let sentence =
        format!("the coordinator was lost ({cause}) and did not come back within {} s", limit.as_secs());
    let hint = "the run goes on when its coordinator is started again, with new workers";
    Problem { exit: Exit::Requeue, ..Problem::failed(sentence).hint(hint) }
}
