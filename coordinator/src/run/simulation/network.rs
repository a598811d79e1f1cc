//! Connections between processes: each direction delivers its parcels in order, after some time, until it ends.
//!
//! A lost packet is sent again by TCP, so loss only holds parcels back; a connection that breaks loses all that is under
//! way. Whoever dies may take along what it has just sent.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use protocol::message::Generation;

use super::dice::Dice;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Node {
    Coordinator,
    Worker(u32),
}

impl Node {
    pub(super) fn number(self) -> u64 {
        match self {
            Self::Coordinator => 0,
            Self::Worker(number) => number.into(),
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("coordinator"),
            Self::Worker(number) => write!(f, "worker-{number}"),
        }
    }
}

/// A node between a start and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Process {
    pub(super) node: Node,
    /// Counts its starts, from 1.
    pub(super) life: u32,
}

impl Process {
    /// The worker's number, if it is one.
    pub(super) fn number(self) -> Option<u32> {
        match self.node {
            Node::Coordinator => None,
            Node::Worker(number) => Some(number),
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Plane {
    /// A worker's to its coordinator; counts those that it has opened.
    Control(u32),
    /// Between members of a generation.
    Data(Generation),
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Wire {
    pub(super) from: Process,
    pub(super) to: Process,
    pub(super) plane: Plane,
}

impl Wire {
    pub(super) fn back(self) -> Self {
        Self { from: self.to, to: self.from, ..self }
    }

    fn connection(self) -> Self {
        if self.from < self.to { self } else { self.back() }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Parcel {
    Frame(Bytes),
    /// Nothing comes after it.
    End,
}

/// A parcel on its way.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) wire: Wire,
    /// Its place on the wire.
    number: u64,
    pub(super) parcel: Parcel,
}

/// What is wrong between two nodes for a while.
#[derive(Debug, Clone, Copy)]
struct Weather {
    from: Node,
    to: Node,
    until: Duration,
    /// What everything takes longer; none if nothing gets through.
    slower_by: Option<Duration>,
}

#[derive(Debug, Default)]
struct Traffic {
    sent: u64,
    /// When the last parcel arrives.
    last: Duration,
    /// Those of these parcels that have not arrived never do.
    lost: Range<u64>,
}

pub(super) struct Network {
    seed: u64,
    weather: Vec<Weather>,
    open: BTreeSet<Wire>,
    closed: BTreeSet<Wire>,
    traffic: HashMap<Wire, Traffic>,
    /// The longest usual delay.
    delay: Duration,
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        let delay = Dice::new(seed, &[2]).pick(&[1, 5, 50].map(Duration::from_millis));
        Self {
            seed,
            weather: Vec::new(),
            open: BTreeSet::new(),
            closed: BTreeSet::new(),
            traffic: HashMap::new(),
            delay,
        }
    }

    /// Sends a parcel; gives when it arrives. Nothing is sent on a connection that has ended.
    pub(super) fn send(&mut self, now: Duration, wire: Wire, parcel: Parcel) -> Option<(Duration, Sent)> {
        if self.closed.contains(&wire.connection()) {
            return None;
        }
        self.open.insert(wire.connection());
        Some(self.put(now, wire, parcel))
    }

    /// Ends a connection from one side, by `wire`; gives when the other side learns of it.
    pub(super) fn close(&mut self, now: Duration, wire: Wire) -> Option<(Duration, Sent)> {
        self.closed.insert(wire.connection());
        self.open.remove(&wire.connection()).then(|| self.put(now, wire, Parcel::End))
    }

    fn put(&mut self, now: Duration, wire: Wire, parcel: Parcel) -> (Duration, Sent) {
        let slower: Duration = self
            .weather
            .iter()
            .filter(|weather| {
                (weather.from, weather.to) == (wire.from.node, wire.to.node) && now < weather.until
            })
            .filter_map(|weather| weather.slower_by)
            .sum();
        let traffic = self.traffic.entry(wire).or_default();
        let words = [3, wire.from.node.number(), wire.to.node.number(), traffic.sent];
        let delay = Dice::new(self.seed, &words).between(self.delay / 10..self.delay);
        traffic.last = traffic.last.max(now + delay + slower);
        let number = traffic.sent;
        traffic.sent += 1;
        (traffic.last, Sent { wire, number, parcel })
    }

    /// Ends all connections of a process that has died; gives who learns of it and when.
    pub(super) fn died(&mut self, now: Duration, process: Process, dice: &mut Dice) -> Vec<(Duration, Sent)> {
        let takes_along = dice.once_in(2);
        let of_it = |wire: &&Wire| wire.from == process || wire.to == process;
        let ended: Vec<Wire> = self.open.iter().filter(of_it).copied().collect();
        let mut told = Vec::new();
        for wire in ended {
            let wire = if wire.from == process { wire } else { wire.back() };
            if takes_along && let Some(traffic) = self.traffic.get_mut(&wire) {
                traffic.lost = traffic.sent.saturating_sub(dice.below(12))..traffic.sent;
            }
            told.extend(self.close(now, wire));
        }
        told
    }

    /// Breaks all connections between two nodes; gives who learns of it and when.
    pub(super) fn reset(&mut self, now: Duration, one: Node, other: Node) -> Vec<(Duration, Sent)> {
        let between = |wire: &&Wire| [(one, other), (other, one)].contains(&(wire.from.node, wire.to.node));
        let broken: Vec<Wire> = self.open.iter().filter(between).copied().collect();
        let mut told = Vec::new();
        for wire in broken {
            self.open.remove(&wire);
            self.closed.insert(wire);
            for wire in [wire, wire.back()] {
                let traffic = self.traffic.entry(wire).or_default();
                traffic.lost = 0..traffic.sent;
                told.push(self.put(now, wire, Parcel::End));
            }
        }
        told
    }

    /// Nothing gets from one node to another until then; or everything takes longer.
    pub(super) fn disturb(&mut self, from: Node, to: Node, until: Duration, slower_by: Option<Duration>) {
        self.weather.push(Weather { from, to, until, slower_by });
    }

    /// Whether a parcel gets lost on its way.
    pub(super) fn is_lost(&self, sent: &Sent) -> bool {
        self.traffic.get(&sent.wire).is_some_and(|traffic| traffic.lost.contains(&sent.number))
    }

    /// Until when a parcel that would arrive now is held back, if it is.
    pub(super) fn held_until(&mut self, now: Duration, wire: Wire) -> Option<Duration> {
        let until = self
            .weather
            .iter()
            .filter(|weather| weather.slower_by.is_none() && weather.until > now)
            .filter(|weather| (weather.from, weather.to) == (wire.from.node, wire.to.node))
            .map(|weather| weather.until)
            .max()?;
        let traffic = self.traffic.entry(wire).or_default();
        traffic.last = traffic.last.max(until);
        Some(until)
    }
}
