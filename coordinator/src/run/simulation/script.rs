//! Faults and their times: drawn from a seed, written down, and made shorter while the run still fails.

use std::fmt;
use std::time::Duration;

use protocol::job::Balance;

use super::dice::Dice;
use super::network::Node;

/// Faults come within this time.
const SPAN: Duration = Duration::from_millis(4000);

/// One thing that happens to a run from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process dies; the supervisor starts it again.
    Kill(Node),
    /// A process dies before or after its part in this message, counted over the whole run.
    KillAt(u64),
    /// SIGSTOP, and SIGCONT after a while.
    Stop(Node, Duration),
    /// Nothing gets through for a while, in one direction.
    Lose(Node, Node, Duration),
    /// Nothing gets through for a while, in both.
    Cut(Node, Node, Duration),
    /// Everything takes so much longer, the second one, for a while.
    Slow(Node, Node, Duration, Duration),
    /// All connections between two nodes break.
    Reset(Node, Node),
    /// A new worker.
    Join(u32),
    /// The worker is killed, and nobody starts it again.
    Leave(u32),
    /// The coordinator is asked to stop; the user starts the run again.
    Drain,
}

/// A fault and when it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timed {
    pub(super) at: Duration,
    pub(super) fault: Fault,
}

/// What befalls a run. The seed also decides delays, and how long the work takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    pub(super) seed: u64,
    /// Workers at the beginning, numbered from 1.
    pub(super) workers: u32,
    /// How shards are dealt to them.
    pub(super) balance: Balance,
    pub(super) faults: Vec<Timed>,
}

impl Script {
    /// A run that nobody disturbs.
    pub(super) fn calm(seed: u64, workers: u32) -> Self {
        Self { seed, workers, balance: Balance::Even, faults: Vec::new() }
    }

    /// The same with shards dealt by speed. How fast workers say that they are changes from step to step.
    pub(super) fn by_speed(self) -> Self {
        Self { balance: Balance::Speed, ..self }
    }

    /// What befalls the run of this seed.
    pub(super) fn draw(seed: u64) -> Self {
        let mut dice = Dice::new(seed, &[1]);
        let workers = 1 + dice.below(4) as u32;
        let count = 1 + dice.below(6);
        let mut faults: Vec<Timed> = (0..count)
            .map(|_| Timed { at: dice.between(Duration::ZERO..SPAN), fault: draw_fault(&mut dice, workers) })
            .collect();
        faults.sort_by_key(|timed| timed.at);
        let script = Self { faults, ..Self::calm(seed, workers) };
        match seed % 2 {
            0 => script,
            _ => script.by_speed(),
        }
    }

    /// When the last fault is over.
    pub(super) fn end(&self) -> Duration {
        let end = |timed: &Timed| {
            timed.at
                + match timed.fault {
                    Fault::Stop(_, length)
                    | Fault::Lose(_, _, length)
                    | Fault::Cut(_, _, length)
                    | Fault::Slow(_, _, _, length) => length,
                    _ => Duration::ZERO,
                }
        };
        self.faults.iter().map(end).max().unwrap_or_default()
    }

    /// The shortest script found for which `fails` still gives a reason: faults are left out one by one, those that are
    /// left are made shorter, and all come earlier where they may.
    pub(super) fn shrunk(mut self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        loop {
            let before = self.clone();
            for index in (0..self.faults.len()).rev() {
                let mut shorter = self.clone();
                shorter.faults.remove(index);
                if fails(&shorter) {
                    self = shorter;
                }
            }
            for index in 0..self.faults.len() {
                let mut shorter = self.clone();
                if shorter.faults[index].fault.halve() && fails(&shorter) {
                    self = shorter;
                }
            }
            if self == before {
                return self;
            }
        }
    }
}

fn draw_fault(dice: &mut Dice, workers: u32) -> Fault {
    let any = |dice: &mut Dice| match dice.below(u64::from(workers) + 1) {
        0 => Node::Coordinator,
        worker => Node::Worker(worker as u32),
    };
    let pair = |dice: &mut Dice| loop {
        let pair = (any(dice), any(dice));
        if pair.0 != pair.1 {
            return pair;
        }
    };
    let worker = |dice: &mut Dice| 1 + dice.below(u64::from(workers)) as u32;
    // Around the limits at which somebody is taken for lost.
    let lengths = [200, 1000, 4500, 5500, 12_000].map(Duration::from_millis);
    match dice.below(14) {
        0 | 1 => Fault::Kill(Node::Worker(worker(dice))),
        2 | 3 => Fault::KillAt(dice.below(800)),
        4 => Fault::Kill(Node::Coordinator),
        5 => Fault::Stop(any(dice), dice.pick(&lengths)),
        6 => Fault::Drain,
        7 => Fault::Leave(worker(dice)),
        8 | 9 => Fault::Join(workers + 1 + dice.below(2) as u32),
        10 => {
            let (one, other) = pair(dice);
            Fault::Reset(one, other)
        }
        11 => {
            let (from, to) = pair(dice);
            Fault::Lose(from, to, dice.pick(&lengths))
        }
        12 => {
            let (one, other) = pair(dice);
            Fault::Cut(one, other, dice.pick(&lengths))
        }
        _ => {
            let (one, other) = pair(dice);
            Fault::Slow(one, other, dice.between(Duration::ZERO..Duration::from_secs(1)), dice.pick(&lengths))
        }
    }
}

impl Fault {
    /// Makes it half as long; false if it has no length worth that.
    fn halve(&mut self) -> bool {
        match self {
            Self::Stop(_, length)
            | Self::Lose(_, _, length)
            | Self::Cut(_, _, length)
            | Self::Slow(_, _, _, length)
                if *length > Duration::from_millis(50) =>
            {
                *length /= 2;
                true
            }
            _ => false,
        }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let balance = match self.balance {
            Balance::Even => "",
            Balance::Speed => ", shards dealt by speed",
        };
        writeln!(f, "seed {}, {} workers{balance}", self.seed, self.workers)?;
        for Timed { at, fault } in &self.faults {
            writeln!(f, "{:>10.6} s  {fault}", at.as_secs_f64())?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(node) => write!(f, "kill {node}"),
            Self::KillAt(point) => write!(f, "kill whoever is at point {point} (counted from the beginning)"),
            Self::Stop(node, length) => write!(f, "stop {node} for {length:?}"),
            Self::Lose(from, to, length) => write!(f, "nothing gets from {from} to {to} for {length:?}"),
            Self::Cut(one, other, length) => {
                write!(f, "nothing gets between {one} and {other} for {length:?}")
            }
            Self::Slow(one, other, by, length) => {
                write!(f, "all between {one} and {other} takes {by:?} longer for {length:?}")
            }
            Self::Reset(one, other) => write!(f, "connections between {one} and {other} break"),
            Self::Join(worker) => write!(f, "worker-{worker} joins"),
            Self::Leave(worker) => write!(f, "worker-{worker} leaves for good"),
            Self::Drain => write!(f, "the coordinator is asked to stop"),
        }
    }
}
