//! The end of a run: after the schedule's last step, on request, or because something failed.
//!
//! Whatever the reason, the members rest first, then the most advanced state is written, then everybody is sent home.

use std::collections::VecDeque;
use std::time::Duration;

use protocol::layout::Progress;
use protocol::message::{Goodbye, Stop, ToWorker, WorkerId};
use protocol::problem::{Exit, Problem};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use super::{Outcome, Run};
use crate::early_end::EarlyEnd;
use crate::membership::{Event, GO_ON};
use crate::server::Arrival;
use crate::store::journal::Record;

/// Once the run is ending, something must bring the end nearer within this time.
const ENDING_LIMIT: Duration = Duration::from_secs(20);

/// Members have this long to finish or drop their step before the last state is asked for without them.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// After the goodbye, workers have this long to close their connections.
const GOODBYE_LIMIT: Duration = Duration::from_secs(3);

/// The run's end under way.
pub(super) struct Ending {
    pub(super) result: Result<Exit, Problem>,
    since: Instant,
    /// When something last brought it nearer.
    progress: Instant,
    /// The replicas' states may be written.
    trusted: bool,
    /// The replicas differ.
    pub(super) has_diverged: bool,
    /// Members whose states are still to be written for whoever looks for the cause.
    pub(super) suspects: VecDeque<WorkerId>,
    /// The member that was asked for the last state.
    pub(super) state_from: Option<WorkerId>,
    /// The user wants the end now.
    cut_short: bool,
}

/// What workers are told of the run's end.
pub(crate) fn goodbye(result: &Result<Exit, Problem>) -> Goodbye {
    let problem = match result {
        Ok(Exit::Done) => return Goodbye::Done,
        Ok(_) => return Goodbye::Requeue,
        Err(problem) => problem,
    };
    let sentence = format!("the run ended: {problem}");
    match problem.exit {
        Exit::Final => Goodbye::Final(sentence),
        _ => Goodbye::Failed(sentence),
    }
}

impl Run {
    /// A signal asks the run to stop: after the step under way, or at once if it has asked before or nothing is there that
    /// could be kept.
    pub(super) fn stop_asked(&mut self) {
        if self.drain_asked || (self.ending.is_none() && !self.has_states()) {
            return self.stop_now();
        }
        self.drain_asked = true;
        self.drain_until = Some(Instant::now() + self.parts.drain_timeout);
        self.parts.screen.notice("stopping after this step (once more: stop at once)");
        self.send_all(&ToWorker::Drain);
    }

    /// Ends the run with what is on the disk.
    fn stop_now(&mut self) {
        self.end(Ok(Exit::Requeue));
        if let Some(ending) = &mut self.ending {
            ending.cut_short = true;
            // What is not on the disk yet is not done.
            if ending.result.is_ok() {
                ending.result = Ok(Exit::Requeue);
            }
        }
    }

    pub(super) fn tick(&mut self) -> Result<(), Problem> {
        if self.drain_until.take_if(|until| Instant::now() >= *until).is_some() {
            let limit = self.parts.drain_timeout.as_secs();
            let sentence = format!("the last state was not written within the {limit} s of --drain-timeout");
            self.parts.screen.notice(&format!("{sentence}: stopping at once"));
            self.stop_now();
        }
        self.look_at_records()?;
        self.decide(Event::Tick)
    }

    /// Says when the disk takes no more records, and when it takes them again. The run goes on meanwhile.
    fn look_at_records(&mut self) -> Result<(), Problem> {
        let records = &mut self.parts.records;
        if records.waiting().is_some() {
            records.flush();
        }
        let waiting = records.waiting();
        if waiting.is_some() == self.records_wait {
            return Ok(());
        }
        self.records_wait = waiting.is_some();
        self.parts.metrics.set_records_waiting(self.records_wait);
        let sentence = match waiting {
            Some(problem) => format!("{problem}; the run goes on, and its records wait in memory"),
            None => "the records that waited in memory are written".to_owned(),
        };
        self.parts.screen.notice(&sentence);
        self.parts.records.journal(&Record::Event { text: sentence })
    }

    /// Gives the run up for a reason that leaves the states whole. What follows from the first reason is not told.
    pub(super) fn give_up(&mut self, problem: Problem) -> Result<(), Problem> {
        let (is_first, text) = (self.ending.is_none(), problem.sentence.clone());
        self.fail(problem, true);
        if is_first { self.parts.records.journal(&Record::Event { text }) } else { Ok(()) }
    }

    /// A member was ended by its control state. All others are by theirs, after the same step: nobody is aborted.
    pub(super) fn end_early(&mut self, stop: &Stop) -> Result<(), Problem> {
        let progress = Progress::after(self.step, self.schedule.steps_per_epoch);
        let Some(early_end) = EarlyEnd::of(stop, &self.parts.file.job, &self.control, progress) else {
            return Ok(());
        };
        let is_first = self.ending.is_none();
        self.end(early_end.result());
        if !is_first {
            return Ok(());
        }
        let text = early_end.sentence.clone();
        self.early_end = Some(early_end);
        self.parts.records.journal(&Record::Event { text })
    }

    pub(super) fn fail(&mut self, problem: Problem, trusted: bool) {
        let generation = self.generation;
        self.send_all(&ToWorker::Abort { generation });
        self.end(Err(problem));
        if !trusted {
            self.distrust();
        }
    }

    /// No state is written any more.
    pub(super) fn distrust(&mut self) {
        if let Some(ending) = &mut self.ending {
            (ending.trusted, ending.state_from) = (false, None);
        }
    }

    /// Begins the run's end. The first result stands, but for a failure that shows only then.
    pub(super) fn end(&mut self, result: Result<Exit, Problem>) {
        if let Some(ending) = &mut self.ending {
            if ending.result.is_ok() && result.is_err() {
                ending.result = result;
            }
        } else {
            let since = Instant::now();
            let ending = Ending {
                result,
                since,
                progress: since,
                trusted: true,
                has_diverged: false,
                suspects: VecDeque::new(),
                state_from: None,
                cut_short: false,
            };
            self.ending = Some(ending);
            self.with_status(|status| status.phase = "ending");
            // Whoever leaves from now on may.
            let _ = self.decide(Event::Ending);
        }
    }

    /// Whether any worker holds a state: it trains, or has stopped with one.
    pub(super) fn has_states(&self) -> bool {
        self.training() > 0 || self.stopped.values().any(Option::is_some)
    }

    /// Members that are connected and still train.
    pub(super) fn training(&self) -> usize {
        self.at_work().count()
    }

    /// These members.
    pub(super) fn at_work(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.members().iter().copied().filter(|&id| self.works(id))
    }

    /// Whether this member is one of them.
    fn works(&self, id: WorkerId) -> bool {
        self.workers.contains_key(&id) && !self.stopped.contains_key(&id)
    }

    /// Whether this worker is a member that trains.
    pub(super) fn is_at_work(&self, id: WorkerId) -> bool {
        self.works(id) && self.members().contains(&id)
    }

    /// Something brought the end nearer: its limit begins anew.
    pub(super) fn ending_goes_on(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.progress = Instant::now();
        }
    }

    /// Once all members rest, or long enough were asked to, asks the most advanced for the last state, if it is not
    /// written yet.
    pub(super) fn settle(&mut self) {
        if self.ending.is_none() {
            return;
        }
        let is_idle = self.writing == 0 && !self.arriving.is_under_way();
        let all_rest = self.training() == 0;
        // Of several that are equal the first, which may have been asked before: one asked twice sends one after the other.
        let held =
            self.membership.members().iter().rev().filter_map(|id| Some(((*self.stopped.get(id)?)?, *id)));
        let (Some(ending), Some((stage, id))) = (&mut self.ending, held.max_by_key(|(stage, _)| *stage))
        else {
            return;
        };
        let is_written = self.parts.records.checkpoint.is_some_and(|written| written >= stage);
        // A member that hangs is not waited for to the end.
        let may_ask = all_rest || ending.since.elapsed() >= REST_LIMIT;
        if may_ask && is_idle && ending.state_from.is_none() && !ending.suspects.is_empty() {
            if let Some((id, step)) = self.next_suspect() {
                self.send(id, &ToWorker::SendState { at_step: step });
                if let Some(ending) = &mut self.ending {
                    ending.state_from = Some(id);
                }
            }
            return;
        }
        if may_ask
            && is_idle
            && ending.trusted
            && ending.state_from.is_none()
            && !is_written
            && stage.step > 0
        {
            ending.state_from = Some(id);
            self.send(id, &ToWorker::SendState { at_step: stage.step });
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.ending
            .as_ref()
            .is_some_and(|ending| self.is_complete() || ending.progress.elapsed() >= ENDING_LIMIT)
    }

    /// Nobody trains and nothing is on its way to the disk.
    fn is_complete(&self) -> bool {
        let is_asked = self.ending.as_ref().is_some_and(|ending| ending.state_from.is_some());
        let is_cut_short = self.ending.as_ref().is_some_and(|ending| ending.cut_short);
        let owes = self.ending.as_ref().is_some_and(|ending| !ending.suspects.is_empty());
        let rests =
            !owes && self.training() == 0 && self.writing == 0 && !self.arriving.is_under_way() && !is_asked;
        rests || is_cut_short
    }

    /// Sends everybody home.
    pub(super) async fn say_goodbye(mut self, arrivals: &mut UnboundedReceiver<Arrival>) -> Outcome {
        let newest = self.furthest.filter(|stage| stage.step > 0);
        let is_written = newest.is_none_or(|newest| self.parts.records.checkpoint >= Some(newest));
        let is_done = is_written || self.ending.as_ref().is_some_and(|ending| ending.cut_short);
        let result = self.ending.take().map_or(Ok(Exit::Done), |ending| ending.result).and_then(|exit| {
            if is_done {
                return Ok(exit);
            }
            let limit = ENDING_LIMIT.as_secs();
            let sentence = format!("the last state was not written: nothing came for {limit} s");
            Err(Problem::failed(sentence).hint(GO_ON))
        });
        let outcome = match &result {
            Ok(Exit::Done) => "done".to_owned(),
            Ok(_) => "stopped on request".to_owned(),
            Err(problem) => format!("failed: {problem}"),
        };
        self.write_profile();
        self.feeders.clear();
        let goodbye = ToWorker::Goodbye(goodbye(&result));
        self.send_all(&goodbye);
        let all_left = async {
            while !self.workers.is_empty() {
                match arrivals.recv().await {
                    Some(Arrival::Left(id, _)) => drop(self.workers.remove(&id)),
                    // It has only just found this coordinator.
                    Some(Arrival::Joined(_, _, link)) => link.send(&goodbye),
                    Some(_) => {}
                    None => break,
                }
            }
        };
        let _ = tokio::time::timeout(GOODBYE_LIMIT, all_left).await;
        // The last word: until it is there, workers may not know that the run has ended.
        let journaled = self.parts.records.journal(&Record::Finish { step: self.step, outcome });
        Outcome {
            step: self.step,
            train_loss: self.control.epoch.mean_loss(),
            validation: self.validation,
            early_end: self.early_end,
            result: result.and_then(|exit| journaled.map(|()| exit)),
            parts: self.parts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_told_whether_the_run_would_fail_again() {
        let failed = "the run ended: no".to_owned();
        for (result, told) in [
            (Ok(Exit::Done), Goodbye::Done),
            (Ok(Exit::Requeue), Goodbye::Requeue),
            (Err(Problem::failed("no")), Goodbye::Failed(failed.clone())),
            (Err(Problem::usage("no")), Goodbye::Failed(failed.clone())),
            (Err(Problem::for_good("no")), Goodbye::Final(failed)),
        ] {
            assert_eq!(goodbye(&result), told);
        }
    }
}
