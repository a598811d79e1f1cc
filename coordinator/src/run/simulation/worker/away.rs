//! A worker without a coordinator: it keeps what it has, says in its next hello what that is, and tells again what is not
//! on record.

use std::collections::VecDeque;
use std::time::Duration;

use protocol::frame::encode_message;
use protocol::message::{Held, HeldState, Hello, Holding, ToCoordinator, Welcome};

use super::super::network::{Plane, Process, Wire};
use super::{Output, Timer, Worker};

/// As in `worker::session::away`.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// How it stands with the coordinator.
pub(super) enum Link {
    /// There is none.
    Away,
    /// It was greeted, and has not answered.
    Greeting(Unsaid),
    Up,
}

/// What is said once the coordinator has answered.
#[derive(Default)]
pub(super) struct Unsaid {
    /// When it was greeted, the connections to all peers stood.
    is_connected: bool,
    /// What came up since.
    messages: Vec<ToCoordinator>,
}

/// `worker::reports`, without its limit: no run here is as long.
pub(super) struct Reports {
    /// Each with the steps done when it was made.
    kept: VecDeque<(u64, ToCoordinator)>,
    /// All reports of this step and later ones are here.
    from: u64,
}

impl Default for Reports {
    fn default() -> Self {
        Self { kept: VecDeque::new(), from: 1 }
    }
}

impl Reports {
    pub(super) fn begin(&mut self, step: u64) {
        while self.kept.back().is_some_and(|(last, _)| *last > step) {
            self.kept.pop_back();
        }
        if self.kept.back().is_none_or(|(last, _)| *last < step) {
            self.kept.clear();
            self.from = step + 1;
        }
    }

    fn keep(&mut self, message: &ToCoordinator) {
        let step = match message {
            ToCoordinator::Step(report) => report.step,
            ToCoordinator::Evaluation { step, .. } | ToCoordinator::Digest { step, .. } => *step,
            _ => return,
        };
        self.kept.push_back((step, message.clone()));
    }

    fn since(&self, step: u64) -> Vec<ToCoordinator> {
        self.kept.iter().filter(|(of, _)| *of >= step).map(|(_, message)| message.clone()).collect()
    }
}

impl Worker {
    /// A message from the training thread or of the session.
    pub(super) fn tell(&mut self, message: ToCoordinator) {
        match &mut self.link {
            Link::Greeting(unsaid) => unsaid.messages.push(message),
            Link::Away => self.note(&message),
            Link::Up => {
                self.note(&message);
                self.send_control(encode_message(&message));
            }
        }
    }

    /// `Session::note`.
    fn note(&mut self, message: &ToCoordinator) {
        self.reports.keep(message);
        let Some(training) = &mut self.training else { return };
        match message {
            ToCoordinator::Credit { generation, batches } if *generation == training.form.generation => {
                training.window += batches;
            }
            ToCoordinator::Connected { generation } if *generation == training.form.generation => {
                training.is_connected = true;
            }
            _ => {}
        }
    }

    /// The connection has ended without a goodbye.
    pub(super) fn lose_coordinator(&mut self) {
        // Nobody was told: a later hello comes behind it.
        if let Link::Greeting(unsaid) = std::mem::replace(&mut self.link, Link::Away) {
            unsaid.messages.iter().for_each(|message| self.note(message));
        }
        // Nobody will send the rest of it.
        self.next = None;
        self.states.clear();
        self.out.push(Output::Seek);
    }

    /// Its coordinator has not answered for long.
    pub(super) fn is_not_answered(&mut self, plane: Plane) {
        if let (Some(wire), Link::Greeting(_)) = (self.control, &self.link)
            && wire.plane == plane
        {
            self.out.push(Output::Close(wire));
            self.lose_coordinator();
        }
    }

    /// A coordinator was found: says hello.
    pub(in super::super) fn greet(&mut self, coordinator: Process) -> Vec<Output> {
        let dialed = match self.control.map(|wire| wire.plane) {
            Some(Plane::Control(dialed)) => dialed,
            Some(Plane::Data(_)) | None => 0,
        };
        let wire = Wire { from: self.me, to: coordinator, plane: Plane::Control(dialed + 1) };
        self.control = Some(wire);
        let hello = ToCoordinator::Hello(Hello {
            name: self.me.node.to_string(),
            build: "simulated".into(),
            device: "simulated".into(),
            bits: "simulated".into(),
            threads: 1,
            // How peers find this process: see `process_at`.
            data_port: self.me.life as u16,
            advertise: None,
            metrics: None,
            incarnation: self.me.node.number() << 32 | u64::from(self.me.life),
            held: self.holding(),
        });
        let is_connected = self.training.as_ref().is_some_and(|training| training.is_connected);
        self.link = Link::Greeting(Unsaid { is_connected, messages: Vec::new() });
        self.send_control(encode_message(&hello));
        self.wake(GREETING_LIMIT, Timer::Greeting(wire.plane));
        self.taken()
    }

    /// What this worker holds of the run; nothing if it never had a part in it.
    fn holding(&self) -> Option<Held> {
        let holding = match &self.training {
            Some(training) => Holding::Place {
                rank: training.rank,
                shards: training.form.members[training.rank as usize].shards.clone(),
                next: training.next,
                window: training.window,
            },
            None => Holding::State(self.held_state(false)?),
        };
        let (run_id, generation) = (self.run_id.clone()?, self.generation);
        Some(Held { run_id, generation, reports_from: self.reports.from, holding })
    }

    /// `Session::held_state`.
    pub(super) fn held_state(&self, has_finished: bool) -> Option<HeldState> {
        let schedule = self.job.schedule;
        self.replica.as_ref().map(|replica| {
            let step = replica.step;
            let owes_last = !has_finished && schedule.evaluates_after(step) && !schedule.ends_epoch(step);
            HeldState { step, owes_evaluation: replica.owes_evaluation(schedule) || owes_last }
        })
    }

    /// The coordinator has answered: takes up where the last one was lost.
    pub(super) fn welcomed(&mut self, welcome: &Welcome) {
        let Link::Greeting(unsaid) = std::mem::replace(&mut self.link, Link::Up) else {
            return self.wrong("a second welcome");
        };
        if self.run_id.get_or_insert_with(|| welcome.run_id.clone()) != &welcome.run_id {
            return self.wrong("another run");
        }
        // Whether it is also with its evaluation not done is not known here.
        self.is_of_use = self.reports.from <= welcome.on_record;
        for report in self.reports.since(welcome.on_record) {
            self.send_control(encode_message(&report));
        }
        let generation = self.generation;
        if unsaid.is_connected {
            self.send_control(encode_message(&ToCoordinator::Connected { generation }));
        }
        for message in unsaid.messages {
            self.tell(message);
        }
    }
}
