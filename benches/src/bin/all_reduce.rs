//! One of two processes that sum the same buffers, again and again: ours, or bare sockets.
//!
//! Both read lines `BYTES ROUNDS` from standard input, each the order to sum a buffer of that size that often; rank 0
//! answers with a JSON line, the microseconds of every round. `compare-all-reduce` starts the processes and gives the
//! orders in turn, to these and to `peers/gloo_all_reduce.py`.
//!
//! | contestant | what a round is |
//! |---|---|
//! | `ours` | `begin_reduce` and `wait` of the collective, one shard per rank, on the CPU device |
//! | `both-ways` | bare sockets, and what a sum of two ranks cannot do without: a rank sends the half that the other one adds, receives its own half and adds it, sends the sums, receives the others; a second thread sends while the first receives |
//! | `in-turn` | the same with one thread: rank 0 sends while rank 1 receives, then the other way round |
//! | `exchange` | as `both-ways`, without the addition |
#![forbid(unsafe_code)]

use std::io::{self, BufRead, Read, Write};
use std::mem::take;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use benches::workload::Workload;
use bytemuck::{cast_slice, cast_slice_mut};
use clap::{Parser, ValueEnum};
use kernels::Simd;
use kernels::cpu::reduce::tree_add;
use model::cpu::{CpuBackend, CpuDevice};
use model::device::Backend;
use protocol::handshake::Token;
use protocol::message::Member;
use protocol::problem::Problem;
use protocol::tree::TreeNode;
use serde_json::json;
use worker::collective::Collective;
use worker::collective::mesh::{FORM_LIMIT, Mesh, Place};
use worker::collective::tcp::{SILENCE_LIMIT, TcpCollective};

/// Rounds before the first that is timed: to meet, and to touch fresh memory.
const WARM_UP: usize = 2;
/// The bare ranks receive and add this many floats at a time: they stay in the cache between the two.
const ADDED_AT_ONCE: usize = 64 << 10;

/// One of two processes that sum the same buffers; orders come from standard input.
#[derive(Debug, Parser)]
#[command(name = "lockstep-all-reduce")]
struct Args {
    contestant: Contestant,
    /// Of this process: 0 or 1
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(0..2))]
    rank: u32,
    /// Where rank 0 listens, on loopback
    #[arg(long, value_name = "N")]
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Contestant {
    Ours,
    BothWays,
    InTurn,
    Exchange,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(problem.exit as u8)
        }
    }
}

fn run(args: &Args) -> Result<(), Problem> {
    let (rank, mut mesh) = (args.rank, connect(args)?);
    if args.contestant == Contestant::Ours {
        let mut ours = Ours::new(rank, mesh)?;
        return follow_orders(rank, |floats, count| ours.rounds(floats, count));
    }
    let stream = mesh.streams[1 - rank as usize].take().expect("a stream between the two ranks");
    let mut stream = stream.tcp().try_clone().map_err(|error| Problem::failed(error.to_string()))?;
    follow_orders(rank, |floats, count| match args.contestant {
        Contestant::InTurn => in_turn(&mut stream, rank, floats, count),
        other => both_ways(&stream, rank, floats, count, other != Contestant::Exchange),
    })
}

fn follow_orders(rank: u32, mut rounds: impl FnMut(usize, usize) -> Vec<f64>) -> Result<(), Problem> {
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| Problem::failed(error.to_string()))?;
        let order = line
            .split_once(' ')
            .and_then(|(bytes, count)| Some((bytes.parse::<usize>().ok()?, count.parse::<usize>().ok()?)));
        let (bytes, count) =
            order.ok_or_else(|| Problem::usage(format!("\"{line}\" is not BYTES ROUNDS")))?;
        let micros = rounds(bytes / 4, count);
        if rank == 0 {
            println!("{}", json!(micros));
        }
    }
    Ok(())
}

/// Connects the two ranks as workers are connected.
fn connect(args: &Args) -> Result<Mesh, Problem> {
    let port = if args.rank == 0 { args.port } else { 0 };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .map_err(|error| Problem::failed(format!("cannot listen on port {port}: {error}")))?;
    let member = |rank: u32| Member {
        worker_id: rank,
        name: format!("w{rank}"),
        address: format!("127.0.0.1:{}", args.port),
        shards: rank..rank + 1,
    };
    let place = Place { generation: 1, rank: args.rank, members: vec![member(0), member(1)] };
    Mesh::connect(&listener, &Token::new(""), None, place, FORM_LIMIT, &AtomicBool::new(false))
        .map_err(|error| Problem::failed(error.to_string()))
}

/// Microseconds of `count` rounds, after a few that do not count.
fn timed(count: usize, mut round: impl FnMut()) -> Vec<f64> {
    for _ in 0..WARM_UP {
        round();
    }
    let once = |_| {
        let started = Instant::now();
        round();
        1e6 * started.elapsed().as_secs_f64()
    };
    (0..count).map(once).collect()
}

/// What rank `r` brings: `r + 1` everywhere, so that the sum is 3.
fn addends(rank: u32, floats: usize) -> Vec<f32> {
    vec![rank as f32 + 1.0; floats]
}

/// One worker: its collective, and a device whose buffers are host memory.
struct Ours {
    node: TreeNode,
    device: CpuDevice,
    collective: TcpCollective,
}

impl Ours {
    fn new(rank: u32, mesh: Mesh) -> Result<Self, Problem> {
        let workload = Workload::new("mnist-rnn", &[])?;
        let device = CpuBackend::new(Simd::detect(), 1)
            .open(&workload.layout, &workload.job, &workload.data, false)
            .map_err(|error| Problem::failed(error.to_string()))?;
        let collective = TcpCollective::new(mesh, SILENCE_LIMIT, Arc::default())
            .map_err(|error| Problem::failed(error.to_string()))?;
        Ok(Self { node: TreeNode { level: 0, index: rank }, device, collective })
    }

    fn rounds(&mut self, floats: usize, count: usize) -> Vec<f64> {
        let (values, mut sum) = (addends(self.node.index, floats), vec![0.0; floats]);
        let collective: &mut dyn Collective<CpuDevice> = &mut self.collective;
        let times = timed(count, || {
            let ticket = collective
                .begin_reduce(&self.device, 0..floats, &[(self.node, &values)], &mut sum)
                .expect("begun");
            collective.wait(&self.device, ticket, &mut sum).expect("finished");
        });
        assert!(sum.iter().all(|value| *value == 3.0), "1 + 2 = 3");
        times
    }
}

/// One rank of the bare sum. Halves are buffers of their own: one travels while the other is received.
struct Bare {
    own: Vec<f32>,
    others: Vec<f32>,
    addends: Vec<f32>,
}

impl Bare {
    fn new(rank: u32, floats: usize) -> Self {
        let half = floats / 2;
        Self {
            own: addends(rank, half),
            others: addends(rank, half),
            addends: vec![0.0; half.min(ADDED_AT_ONCE)],
        }
    }

    fn receive_and_add(&mut self, mut stream: &TcpStream) {
        let simd = Simd::detect();
        for sums in self.own.chunks_mut(ADDED_AT_ONCE) {
            let addends = &mut self.addends[..sums.len()];
            stream.read_exact(cast_slice_mut(addends)).expect("received");
            tree_add(simd, sums, addends);
        }
    }
}

fn in_turn(stream: &mut TcpStream, rank: u32, floats: usize, count: usize) -> Vec<f64> {
    let mut bare = Bare::new(rank, floats);
    timed(count, || {
        if rank == 0 {
            stream.write_all(cast_slice(&bare.others)).expect("sent");
            bare.receive_and_add(stream);
            stream.write_all(cast_slice(&bare.own)).expect("sent");
            stream.read_exact(cast_slice_mut(&mut bare.others)).expect("received");
        } else {
            bare.receive_and_add(stream);
            stream.write_all(cast_slice(&bare.others)).expect("sent");
            stream.read_exact(cast_slice_mut(&mut bare.others)).expect("received");
            stream.write_all(cast_slice(&bare.own)).expect("sent");
        }
    })
}

fn both_ways(mut stream: &TcpStream, rank: u32, floats: usize, count: usize, adds: bool) -> Vec<f64> {
    let (outbox, to_send) = channel::<Vec<f32>>();
    let (sent, came_back) = channel();
    let mut bare = Bare::new(rank, floats);
    let mut idle: Vec<f32> = vec![0.0; floats / 2];
    thread::scope(|scope| {
        scope.spawn(move || {
            for values in to_send {
                stream.write_all(cast_slice(&values)).expect("sent");
                sent.send(values).expect("the receiving thread runs");
            }
        });
        let times = timed(count, || {
            outbox.send(take(&mut bare.others)).expect("the sending thread runs");
            if adds {
                bare.receive_and_add(stream);
            } else {
                stream.read_exact(cast_slice_mut(&mut idle)).expect("received");
            }
            outbox.send(take(&mut bare.own)).expect("the sending thread runs");
            bare.others = came_back.recv().expect("the sending thread runs");
            stream.read_exact(cast_slice_mut(&mut bare.others)).expect("received");
            bare.own = came_back.recv().expect("the sending thread runs");
        });
        drop(outbox);
        times
    })
}
