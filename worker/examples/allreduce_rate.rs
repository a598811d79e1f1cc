//! How long an all-reduce of two workers in one process takes, beside a bare exchange of the same bytes.
//!
//! `cargo run --release -p lockstep-worker --example allreduce_rate`
//!
//! The bare exchange has the same shape, two dependent rounds in each of which both workers send half of the bytes
//! to each other at the same time, but no checksum, no conversion, no addition and no copy.

#[path = "../src/collective/host_device.rs"]
mod host_device;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use host_device::HostDevice;
use protocol::handshake::Token;
use protocol::message::Member;
use protocol::tree::TreeNode;
use worker::collective::Collective;
use worker::collective::mesh::{FORM_LIMIT, Mesh, Place};
use worker::collective::tcp::{SILENCE_LIMIT, TcpCollective};

const WARM_UP: usize = 20;
const FLOATS: [(usize, usize); 3] = [(16 << 10, 1000), (256 << 10, 400), (4 << 20, 60)];

fn main() {
    println!("{:>10} {:>14} {:>14} {:>6}", "bytes", "all-reduce us", "bare us", "ratio");
    for (floats, rounds) in FLOATS {
        let reduce = median(on_two_workers(|rank, mesh| reduce_times(rank, mesh, floats, rounds)));
        let bare = median(on_two_workers(|_, mesh| bare_times(mesh, 2 * floats, rounds)));
        let ratio = reduce.as_secs_f64() / bare.as_secs_f64();
        println!("{:>10} {:>14} {:>14} {ratio:>6.2}", 4 * floats, reduce.as_micros(), bare.as_micros());
    }
}

/// Connects two threads, runs the closure on both and returns the times of the first.
fn on_two_workers(run: impl Fn(u32, Mesh) -> Vec<Duration> + Sync) -> Vec<Duration> {
    let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    let member = |rank: u32| Member {
        worker_id: rank,
        name: format!("w{rank}"),
        address: listeners[rank as usize].local_addr().expect("a bound port").to_string(),
        shards: rank..rank + 1,
    };
    let members = vec![member(0), member(1)];
    let work = |rank: u32| {
        let place = Place { generation: 1, rank, members: members.clone() };
        let (token, never) = (Token::new(""), AtomicBool::new(false));
        let mesh = Mesh::connect(&listeners[rank as usize], &token, place, FORM_LIMIT, &never);
        run(rank, mesh.expect("both threads connect"))
    };
    thread::scope(|scope| {
        scope.spawn(|| work(1));
        work(0)
    })
}

fn reduce_times(rank: u32, mesh: Mesh, floats: usize, rounds: usize) -> Vec<Duration> {
    let mut collective = TcpCollective::new(mesh, SILENCE_LIMIT, Arc::default()).expect("threads start");
    let values = vec![rank as f32; floats];
    let mut sum = vec![0.0; floats];
    let node = TreeNode { level: 0, index: rank };
    let times = timed(rounds, || {
        let ticket = collective.begin_reduce(&HostDevice, 0..floats, &[(node, &values)]).expect("begun");
        collective.wait(&HostDevice, ticket, &mut sum).expect("finished");
    });
    assert!(sum.iter().all(|value| *value == 1.0), "0 + 1 = 1");
    times
}

fn bare_times(mesh: Mesh, half: usize, rounds: usize) -> Vec<Duration> {
    let mut stream: TcpStream = mesh.streams.into_iter().flatten().next().expect("one peer");
    let mut sender = stream.try_clone().expect("a second handle");
    let (go, told) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let bytes = vec![1; half];
            while told.recv().is_ok() {
                sender.write_all(&bytes).expect("sent");
            }
        });
        let mut bytes = vec![0; half];
        let times = timed(rounds, || {
            for _ in 0..2 {
                go.send(()).expect("the sender runs");
                stream.read_exact(&mut bytes).expect("received");
            }
        });
        drop(go);
        times
    })
}

fn timed(rounds: usize, mut round: impl FnMut()) -> Vec<Duration> {
    for _ in 0..WARM_UP {
        round();
    }
    let once = |_| {
        let started = Instant::now();
        round();
        started.elapsed()
    };
    (0..rounds).map(once).collect()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
