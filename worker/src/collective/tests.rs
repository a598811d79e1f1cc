//! The collective as a fleet sees it: threads as workers, real sockets on loopback.

use std::net::TcpListener;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use protocol::handshake::Token;
use protocol::message::Member;
use protocol::random::mix64;
use protocol::slots::shards_of_rank;
use protocol::tree::{self, Addition, TreeNode};

use super::host_device::HostDevice;
use super::mesh::{FORM_LIMIT, Mesh, Place};
use super::tcp::{DataPlaneBytes, SILENCE_LIMIT, TcpCollective};
use super::{Collective, CollectiveError, Ticket};

/// The collectives of one generation, by rank.
pub(super) fn fleet(shards: u32, world_size: u32, timeout: Duration) -> Vec<TcpCollective> {
    counted_fleet(shards, world_size, timeout, &Arc::default())
}

/// A fleet whose bytes are counted together.
fn counted_fleet(
    shards: u32,
    world_size: u32,
    timeout: Duration,
    bytes: &Arc<DataPlaneBytes>,
) -> Vec<TcpCollective> {
    let listeners: Vec<_> = (0..world_size).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let member = |rank: u32| Member {
        worker_id: 10 + rank,
        name: format!("w{rank}"),
        address: listeners[rank as usize].local_addr().unwrap().to_string(),
        shards: shards_of_rank(shards, world_size, rank),
    };
    let members: Vec<Member> = (0..world_size).map(member).collect();
    thread::scope(|scope| {
        let connect = |(rank, listener)| {
            let place = Place { generation: 3, rank, members: members.clone() };
            scope.spawn(move || {
                Mesh::connect(listener, &Token::new("t"), None, place, FORM_LIMIT, &AtomicBool::new(false))
            })
        };
        let threads: Vec<_> = (0..).zip(&listeners).map(connect).collect();
        threads
            .into_iter()
            .map(|thread| {
                TcpCollective::new(thread.join().unwrap().unwrap(), timeout, bytes.clone()).unwrap()
            })
            .collect()
    })
}

/// Runs the same closure on every worker of a fresh fleet.
fn on_every_worker(
    shards: u32,
    world_size: u32,
    run: &(impl Fn(u32, &mut dyn Collective<HostDevice>) + Sync),
) {
    thread::scope(|scope| {
        for (rank, mut collective) in (0..).zip(fleet(shards, world_size, SILENCE_LIMIT)) {
            scope.spawn(move || run(rank, &mut collective));
        }
    });
}

/// Floats from 1e-18 to 1e18, so that any other order of additions shows.
fn wild(shard: u32, i: usize) -> f32 {
    let bits = mix64(u64::from(shard) << 32 | i as u64);
    f32::from_bits((bits >> 32) as u32 & 0x807f_ffff | (67 + (bits % 120) as u32) << 23)
}

pub(super) fn add(places: &mut [Vec<f32>], additions: &[Addition]) {
    for addition in additions {
        let (left, right) = places.split_at_mut(addition.right as usize);
        for (sum, addend) in left[addition.left as usize].iter_mut().zip(&right[0]) {
            *sum += addend;
        }
    }
}

pub(super) fn partials(shards: u32, len: usize) -> Vec<Vec<f32>> {
    (0..shards).map(|shard| (0..len).map(|i| wild(shard, i)).collect()).collect()
}

/// What a worker brings to a reduction: its shards added as far as it can.
pub(super) fn covered(
    shards: u32,
    range: Range<u32>,
    mut places: Vec<Vec<f32>>,
) -> Vec<(TreeNode, Vec<f32>)> {
    add(&mut places, &tree::subtree(shards, range.clone()));
    let value = |node: &TreeNode| std::mem::take(&mut places[node.range(shards).start as usize]);
    let cover = tree::cover(shards, range);
    let values: Vec<_> = cover.iter().map(value).collect();
    cover.into_iter().zip(values).collect()
}

fn borrowed(nodes: &[(TreeNode, Vec<f32>)]) -> Vec<(TreeNode, &Vec<f32>)> {
    nodes.iter().map(|(node, values)| (*node, values)).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one_process() {
    const LENGTHS: [usize; 4] = [1, 7, 1000, 300_000];
    let total: usize = LENGTHS.iter().sum();
    for shards in [1, 7, 8, 13] {
        let partials = partials(shards, total);
        let mut alone = partials.clone();
        add(&mut alone, &tree::tree(shards));
        let expected = bits(&alone[0]);
        for world_size in [1, 2, 3, 4, 8].into_iter().filter(|world_size| *world_size <= shards) {
            on_every_worker(shards, world_size, &|rank, collective| {
                let nodes = covered(shards, shards_of_rank(shards, world_size, rank), partials.clone());
                let mut end = total;
                // The last bucket first, as a backward pass does; all are under way before one is waited for.
                let buckets = LENGTHS.map(|len| {
                    end -= len;
                    end..end + len
                });
                let mut sum = vec![f32::NAN; total];
                let begin = |bucket: Range<usize>| {
                    collective.begin_reduce(&HostDevice, bucket, &borrowed(&nodes), &mut sum).unwrap()
                };
                let tickets = buckets.map(begin);
                for ticket in [2, 0, 3, 1].map(|i: usize| tickets[i]) {
                    collective.wait(&HostDevice, ticket, &mut sum).unwrap();
                }
                assert!(bits(&sum) == expected, "{shards} shards on {world_size} workers, rank {rank}");
            });
        }
    }
}

#[test]
fn parts_of_any_size_are_gathered() {
    for (world_size, cuts) in [(1, vec![0, 5]), (3, vec![2, 2, 200_000, 200_001]), (4, vec![0, 7, 7, 7, 9])] {
        let parts: Vec<Range<usize>> = cuts.windows(2).map(|w| w[0]..w[1]).collect();
        let len = cuts[world_size as usize] + 3;
        on_every_worker(world_size, world_size, &|rank, collective| {
            let mut buffer = vec![-1.0; len];
            for i in parts[rank as usize].clone() {
                buffer[i] = i as f32;
            }
            let ticket = collective.begin_gather(&HostDevice, &buffer, parts.clone()).unwrap();
            collective.wait(&HostDevice, ticket, &mut buffer).unwrap();
            let value = |i: usize| if (cuts[0]..len - 3).contains(&i) { i as f32 } else { -1.0 };
            assert_eq!(buffer, (0..len).map(value).collect::<Vec<_>>(), "rank {rank} of {world_size}");
        });
    }
}

#[test]
fn bytes_are_exchanged_between_other_operations() {
    on_every_worker(8, 4, &|rank, collective| {
        let nodes = covered(8, shards_of_rank(8, 4, rank), partials(8, 50));
        for round in 0..50u8 {
            let mut sum = vec![f32::NAN; 50];
            let ticket = collective.begin_reduce(&HostDevice, 0..50, &borrowed(&nodes), &mut sum).unwrap();
            let own = vec![round; rank as usize];
            let everybodys = collective.exchange(&own).unwrap();
            assert_eq!(everybodys, (0..4).map(|rank| vec![round; rank]).collect::<Vec<_>>());
            collective.wait(&HostDevice, ticket, &mut sum).unwrap();
        }
    });
}

#[test]
fn sums_and_their_sending_go_on_while_the_training_thread_does_something_else() {
    let (say, hear) = mpsc::channel();
    thread::scope(|scope| {
        let mut workers = fleet(2, 2, SILENCE_LIMIT);
        let (mut second, mut first) = (workers.pop().unwrap(), workers.pop().unwrap());
        let nodes = |rank| covered(2, rank..rank + 1, partials(2, 100_000));
        scope.spawn(move || {
            let nodes = nodes(0);
            let mut sum = vec![0.0; 100_000];
            first.begin_reduce(&HostDevice, 0..100_000, &borrowed(&nodes), &mut sum).unwrap();
            // It is never waited for here, yet the other worker gets this one's slice.
            hear.recv().unwrap();
        });
        let nodes = nodes(1);
        thread::sleep(Duration::from_millis(20));
        let mut sum = vec![0.0; 100_000];
        let ticket = second.begin_reduce(&HostDevice, 0..100_000, &borrowed(&nodes), &mut sum).unwrap();
        second.wait(&HostDevice, ticket, &mut sum).unwrap();
        say.send(()).unwrap();
    });
}

/// Begins a reduction on the worker of rank 0 in which nobody else takes part.
fn begin_alone(workers: &mut [TcpCollective], shards: u32) -> Ticket {
    let nodes = covered(shards, shards_of_rank(shards, workers.len() as u32, 0), partials(shards, 500));
    workers[0].begin_reduce(&HostDevice, 0..500, &borrowed(&nodes), &mut vec![0.0; 500]).unwrap()
}

fn wait(worker: &mut TcpCollective, ticket: Ticket) -> CollectiveError {
    worker.wait(&HostDevice, ticket, &mut vec![0.0; 500]).unwrap_err()
}

#[test]
fn an_abort_ends_waiting_at_once_and_for_good() {
    let mut workers = fleet(3, 3, SILENCE_LIMIT);
    let ticket = begin_alone(&mut workers, 3);
    let handle = Collective::<HostDevice>::abort_handle(&workers[0]);
    let started = Instant::now();
    let aborter = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        handle.abort();
        handle.abort();
        handle
    });
    let error = wait(&mut workers[0], ticket);
    assert!(matches!(error, CollectiveError::Aborted), "{error}");
    let error = Collective::<HostDevice>::exchange(&mut workers[0], b"x").unwrap_err();
    assert!(matches!(error, CollectiveError::Aborted), "{error}");
    let handle = aborter.join().unwrap();
    drop(workers);
    handle.abort();
    assert!(started.elapsed() < Duration::from_secs(1), "it took {:?}", started.elapsed());
}

#[test]
fn a_lost_peer_is_named() {
    let mut workers = fleet(3, 3, SILENCE_LIMIT);
    let ticket = begin_alone(&mut workers, 3);
    // An abort closes the sockets without a goodbye, as a killed process does.
    Collective::<HostDevice>::abort_handle(&workers[2]).abort();
    let message = wait(&mut workers[0], ticket).to_string();
    assert_eq!(message, "lost the connection to worker w2 (rank 2): it closed the connection");
    let error = Collective::<HostDevice>::exchange(&mut workers[0], b"x").unwrap_err();
    assert_eq!(error.to_string(), message);
}

#[test]
fn a_peer_that_left_in_peace_is_missed_only_where_it_is_needed() {
    let mut workers = fleet(3, 3, SILENCE_LIMIT);
    thread::scope(|scope| {
        for worker in &mut workers {
            scope.spawn(|| Collective::<HostDevice>::exchange(worker, b"x").unwrap());
        }
    });
    workers.pop();
    let ticket = begin_alone(&mut workers[..], 2);
    let message = wait(&mut workers[0], ticket).to_string();
    assert_eq!(message, "lost the connection to worker w2 (rank 2): it ended its part of the generation");
}

#[test]
fn silence_is_blamed_on_the_worker_that_did_not_enter() {
    let mut workers = fleet(3, 3, Duration::from_secs(1));
    let nodes: Vec<_> = (0..3).map(|rank| covered(3, rank..rank + 1, partials(3, 500))).collect();
    let tickets: Vec<_> = [0, 1]
        .map(|rank| {
            workers[rank]
                .begin_reduce(&HostDevice, 0..500, &borrowed(&nodes[rank]), &mut vec![0.0; 500])
                .unwrap()
        })
        .into();
    for rank in [0, 1] {
        let message = wait(&mut workers[rank], tickets[rank]).to_string();
        assert_eq!(message, "nothing arrived from worker w2 (rank 2) for 1 s");
    }
}

#[test]
fn bytes_are_counted() {
    const FRAME_BYTES: u64 = 41 + 1;
    let bytes = Arc::new(DataPlaneBytes::default());
    let mut workers = counted_fleet(2, 2, SILENCE_LIMIT, &bytes);
    thread::scope(|scope| {
        for worker in &mut workers {
            scope.spawn(|| Collective::<HostDevice>::exchange(worker, b"x").unwrap());
        }
    });
    assert_eq!(bytes.received(), 2 * FRAME_BYTES);
    drop(workers); // Waits for the writers, which count a frame after it is written.
    assert!(bytes.sent() >= 2 * FRAME_BYTES, "{} bytes sent", bytes.sent());
}

#[test]
fn a_worker_alone_has_no_socket() {
    let bytes = Arc::new(DataPlaneBytes::default());
    let member = Member { worker_id: 0, name: "w".into(), address: String::new(), shards: 0..1 };
    let mut alone = TcpCollective::new(Mesh::alone(1, member), SILENCE_LIMIT, bytes.clone()).unwrap();
    assert_eq!(Collective::<HostDevice>::exchange(&mut alone, b"x").unwrap(), [b"x"]);
    assert_eq!((bytes.sent(), bytes.received()), (0, 0));
}
