//! All-reduce of two workers in one process over loopback: `cargo bench -p lockstep-benches --bench all_reduce`.
//!
//! Time from `begin_reduce` to the end of `wait` on rank 0, one shard per worker, both beginning at the same moment.
#![allow(missing_docs, reason = "criterion's macros make functions of which nobody reads the documentation")]

use std::net::TcpListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use benches::workload::Workload;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::Simd;
use model::cpu::{CpuBackend, CpuDevice};
use model::device::Backend;
use protocol::handshake::Token;
use protocol::message::Member;
use protocol::tree::TreeNode;
use worker::collective::Collective;
use worker::collective::mesh::{FORM_LIMIT, Mesh, Place};
use worker::collective::tcp::{SILENCE_LIMIT, TcpCollective};

/// 64 KiB, 256 KiB, 1 MiB, 4 MiB, 16 MiB of f32.
const FLOATS: [usize; 5] = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// One worker: its collective, and a device whose buffers are host memory.
struct Rank {
    rank: u32,
    device: CpuDevice,
    collective: TcpCollective,
}

impl Rank {
    fn all_reduce(&mut self, values: &Vec<f32>, sum: &mut Vec<f32>) {
        let node = TreeNode { level: 0, index: self.rank };
        let collective: &mut dyn Collective<CpuDevice> = &mut self.collective;
        let ticket =
            collective.begin_reduce(&self.device, 0..values.len(), &[(node, values)]).expect("begun");
        collective.wait(&self.device, ticket, sum).expect("finished");
    }

    /// Runs as many rounds as each message says, until there are no more messages.
    fn follow(mut self, rounds: &mpsc::Receiver<(usize, u64)>) {
        for (floats, rounds) in rounds {
            let (values, mut sum) = (vec![1.0; floats], vec![0.0; floats]);
            (0..rounds).for_each(|_| self.all_reduce(&values, &mut sum));
        }
    }
}

fn two_ranks() -> [Rank; 2] {
    let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    let member = |rank: u32| Member {
        worker_id: rank,
        name: format!("w{rank}"),
        address: listeners[rank as usize].local_addr().expect("a bound port").to_string(),
        shards: rank..rank + 1,
    };
    let members = vec![member(0), member(1)];
    let connect = |rank: u32| {
        let place = Place { generation: 1, rank, members: members.clone() };
        let (token, never) = (Token::new(""), AtomicBool::new(false));
        let mesh = Mesh::connect(&listeners[rank as usize], &token, place, FORM_LIMIT, &never);
        let mesh = mesh.expect("both threads connect");
        let collective = TcpCollective::new(mesh, SILENCE_LIMIT, Arc::default()).expect("threads start");
        let workload = Workload::new("mnist-rnn", &[]).expect("a preset is a valid job");
        let device = CpuBackend::new(Simd::detect(), 1)
            .open(&workload.layout, &workload.job, &workload.data, false)
            .expect("threads start");
        Rank { rank, device, collective }
    };
    thread::scope(|scope| {
        let second = scope.spawn(|| connect(1));
        [connect(0), second.join().expect("the second thread connects")]
    })
}

fn all_reduce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("all-reduce, 2 ranks");
    group.sample_size(20);
    let [mut first, second] = two_ranks();
    let (go, told) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || second.follow(&told));
        for floats in FLOATS {
            group.throughput(Throughput::Bytes(4 * floats as u64));
            group.bench_function(format!("{} KiB", floats / 256), |bencher| {
                let (values, mut sum) = (vec![2.0; floats], vec![0.0; floats]);
                bencher.iter_custom(|rounds| {
                    // One round to meet, and to touch the other side's fresh memory.
                    go.send((floats, rounds + 1)).expect("the second rank runs");
                    first.all_reduce(&values, &mut sum);
                    let started = Instant::now();
                    (0..rounds).for_each(|_| first.all_reduce(&values, &mut sum));
                    started.elapsed()
                });
                assert!(sum.iter().all(|value| *value == 3.0), "2 + 1 = 3");
            });
        }
        drop(go);
    });
    group.finish();
}

criterion_group!(benches, all_reduce);
criterion_main!(benches);
