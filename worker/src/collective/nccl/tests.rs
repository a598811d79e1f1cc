//! The collective over a library that moves numbers between threads, beside TCP meshes on real sockets.

use std::ops::Range;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use kernels::nccl::{OLDEST, Version};
use model::device::Device;
use protocol::slots::shards_of_rank;
use protocol::tree::{self, TreeNode};

use super::super::tcp::{SILENCE_LIMIT, TcpCollective};
use super::super::tests::{add, bits, covered, fleet, partials};
use super::super::{AbortHandle, Collective, CollectiveError, Ticket};
use super::fake_gpu::{FakeBuffer, FakeGpu, Memories};
use super::fake_library::{Event, FakeCommunicator, FakeNccl, Fault};
use super::offer::GpuId;
use super::{Formed, NcclCollective, Own, negotiate};

type Nccl = NcclCollective<FakeCommunicator, FakeBuffer>;

/// More than any abort needs, less than any other limit here.
const SOON: Duration = Duration::from_secs(5);

/// One worker of a test.
struct Worker<C> {
    rank: u32,
    gpu: FakeGpu,
    collective: C,
}

/// A fleet over a library with these faults.
struct Fleet {
    library: FakeNccl,
    workers: Vec<Worker<Nccl>>,
}

impl Fleet {
    fn new(shards: u32, world_size: u32, faults: &[Fault]) -> Self {
        Self::within(SILENCE_LIMIT, shards, world_size, faults)
    }

    fn within(limit: Duration, shards: u32, world_size: u32, faults: &[Fault]) -> Self {
        let memories = Memories::default();
        let library = FakeNccl::new(&memories, faults);
        let workers = form(&library, &memories, limit, fleet(shards, world_size, SILENCE_LIMIT));
        Self { library, workers: workers.into_iter().map(Result::unwrap).collect() }
    }
}

/// Forms a communicator over each of these meshes.
fn form(
    library: &FakeNccl,
    memories: &Memories,
    limit: Duration,
    meshes: Vec<TcpCollective>,
) -> Vec<Result<Worker<Nccl>, CollectiveError>> {
    let id = [9; 128];
    thread::scope(|scope| {
        let form = |(rank, tcp)| {
            scope.spawn(move || {
                let collective = NcclCollective::form(tcp, library, &id, 0, limit)?;
                Ok(Worker { rank, gpu: FakeGpu::new(memories), collective })
            })
        };
        let threads: Vec<_> = (0..).zip(meshes).map(form).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs the same closure on every worker.
fn on_every<C: Send>(workers: Vec<Worker<C>>, run: &(impl Fn(Worker<C>) + Sync)) {
    thread::scope(|scope| {
        for worker in workers {
            scope.spawn(move || run(worker));
        }
    });
}

fn on_gpu(gpu: &FakeGpu, values: &[f32]) -> FakeBuffer {
    let mut buffer = gpu.zeros(values.len()).unwrap();
    gpu.import(&mut buffer, 0, values).unwrap();
    buffer
}

fn on_host(gpu: &FakeGpu, buffer: &FakeBuffer, len: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    gpu.export(buffer, 0..len, &mut values).unwrap();
    values
}

/// What a worker brings to a reduction, on its device.
fn nodes(gpu: &FakeGpu, shards: u32, range: Range<u32>, len: usize) -> Vec<(TreeNode, FakeBuffer)> {
    let nodes = covered(shards, range, partials(shards, len));
    nodes.into_iter().map(|(node, values)| (node, on_gpu(gpu, &values))).collect()
}

fn borrowed(nodes: &[(TreeNode, FakeBuffer)]) -> Vec<(TreeNode, &FakeBuffer)> {
    nodes.iter().map(|(node, buffer)| (*node, buffer)).collect()
}

const LENGTHS: [usize; 4] = [1, 7, 1000, 70_000];
const TOTAL: usize = 1 + 7 + 1000 + 70_000;

/// Reduces some buckets, the last one first as a backward pass does, all under way before one is waited for. The next
/// bucket is written while the last one is under way.
fn reduce<C: Collective<FakeGpu>>(worker: &mut Worker<C>, shards: u32, world_size: u32) -> Vec<f32> {
    let Worker { rank, gpu, collective } = worker;
    let range = shards_of_rank(shards, world_size, *rank);
    let values = covered(shards, range, partials(shards, TOTAL));
    let mut nodes: Vec<(TreeNode, FakeBuffer)> =
        values.iter().map(|(node, values)| (*node, on_gpu(gpu, &vec![f32::NAN; values.len()]))).collect();
    let mut sum = on_gpu(gpu, &[f32::NAN; TOTAL]);
    let mut end = TOTAL;
    let tickets = LENGTHS.map(|len| {
        end -= len;
        let bucket = end..end + len;
        for ((_, buffer), (_, values)) in nodes.iter_mut().zip(&values) {
            gpu.import(buffer, bucket.start, &values[bucket.clone()]).unwrap();
        }
        collective.begin_reduce(gpu, bucket, &borrowed(&nodes), &mut sum).unwrap()
    });
    for ticket in [2, 0, 3, 1].map(|i: usize| tickets[i]) {
        collective.wait(gpu, ticket, &mut sum).unwrap();
    }
    on_host(gpu, &sum, TOTAL)
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one_process_over_nccl_and_over_tcp() {
    for shards in [1, 7, 8, 13] {
        let mut alone = partials(shards, TOTAL);
        add(&mut alone, &tree::tree(shards));
        let expected = bits(&alone[0]);
        for world_size in (1..=5).filter(|world_size| *world_size <= shards) {
            let check = |how: &str, rank: u32, sum: &[f32]| {
                assert!(bits(sum) == expected, "{how}: {shards} shards on {world_size} workers, rank {rank}");
            };
            let Fleet { library, workers } = Fleet::new(shards, world_size, &[]);
            // Those that end wait for each other, but not for long.
            let all_have_it = Barrier::new(world_size as usize);
            on_every(workers, &|mut worker| {
                let sums = [(); 2].map(|()| reduce(&mut worker, shards, world_size));
                all_have_it.wait();
                sums.iter().for_each(|sum| check("NCCL", worker.rank, sum));
            });
            let ended = |event: &Event| matches!(event, Event::Destroyed(_));
            assert_eq!(library.events().iter().filter(|event| ended(event)).count(), world_size as usize);
            // The same device without NCCL: its numbers go through the host.
            let memories = Memories::default();
            let staged = (0..).zip(fleet(shards, world_size, SILENCE_LIMIT));
            let staged =
                staged.map(|(rank, collective)| Worker { rank, gpu: FakeGpu::new(&memories), collective });
            on_every(staged.collect(), &|mut worker| {
                check("TCP", worker.rank, &reduce(&mut worker, shards, world_size));
            });
        }
    }
}

#[test]
fn parts_are_gathered_beside_reductions_and_messages() {
    const LEN: usize = 1000;
    let cuts = [0, 7, 7, 600, 998];
    let parts: Vec<Range<usize>> = cuts.windows(2).map(|w| w[0]..w[1]).collect();
    let mut alone = partials(4, LEN);
    add(&mut alone, &tree::tree(4));
    on_every(Fleet::new(4, 4, &[]).workers, &|Worker { rank, gpu, mut collective }| {
        let nodes = nodes(&gpu, 4, rank..rank + 1, LEN);
        let (mut sum, mut state) = (on_gpu(&gpu, &[0.0; LEN]), on_gpu(&gpu, &[-1.0; LEN]));
        for round in 0..5u8 {
            let own: Vec<f32> = parts[rank as usize].clone().map(|i| i as f32 + f32::from(round)).collect();
            gpu.import(&mut state, parts[rank as usize].start, &own).unwrap();
            let gathered = collective.begin_gather(&gpu, &state, parts.clone()).unwrap();
            let reduced = (round != 3)
                .then(|| collective.begin_reduce(&gpu, 0..LEN, &borrowed(&nodes), &mut sum).unwrap());
            let everybodys =
                Collective::<FakeGpu>::exchange(&mut collective, &[round; 3][..rank as usize % 4]);
            assert_eq!(everybodys.unwrap().len(), 4);
            if let Some(ticket) = reduced {
                collective.wait(&gpu, ticket, &mut sum).unwrap();
            }
            collective.wait(&gpu, gathered, &mut state).unwrap();
            let value = |i: usize| if i < 998 { i as f32 + f32::from(round) } else { -1.0 };
            assert_eq!(on_host(&gpu, &state, LEN), (0..LEN).map(value).collect::<Vec<_>>());
        }
        assert!(bits(&on_host(&gpu, &sum, LEN)) == bits(&alone[0]));
    });
}

/// An operation, and the buffer into which its numbers come.
type Begun = (Result<Ticket, CollectiveError>, FakeBuffer);

/// Begins a reduction on a worker, of one shard for each.
fn begin(worker: &mut Worker<Nccl>, shards: u32) -> Begun {
    let Worker { rank, gpu, collective } = worker;
    let nodes = nodes(gpu, shards, *rank..*rank + 1, 500);
    let mut sum = on_gpu(gpu, &[0.0; 500]);
    let ticket = collective.begin_reduce(gpu, 0..500, &borrowed(&nodes), &mut sum);
    // The communicator reads them for as long as it lives.
    std::mem::forget(nodes);
    (ticket, sum)
}

fn begin_and_wait(worker: &mut Worker<Nccl>, shards: u32) -> Result<(), CollectiveError> {
    let (ticket, mut sum) = begin(worker, shards);
    worker.collective.wait(&worker.gpu, ticket?, &mut sum)
}

fn abort_handle(worker: &Worker<Nccl>) -> AbortHandle {
    Collective::<FakeGpu>::abort_handle(&worker.collective)
}

#[test]
fn an_abort_ends_waiting_at_once_and_the_communicator_is_aborted_and_not_destroyed() {
    let slow = Duration::from_millis(300);
    let Fleet { library, mut workers } = Fleet::new(3, 3, &[Fault::SlowAbort(0, slow)]);
    let handle = abort_handle(&workers[0]);
    let started = Instant::now();
    let aborter = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        let before = Instant::now();
        handle.abort();
        handle.abort();
        (handle, before.elapsed())
    });
    // Nobody else takes part.
    let error = begin_and_wait(&mut workers[0], 3).unwrap_err();
    assert!(matches!(error, CollectiveError::Aborted), "{error}");
    let (handle, took) = aborter.join().unwrap();
    assert!(took < slow, "whoever aborts does not wait for NCCL: {took:?}");
    assert!(begin_and_wait(&mut workers[0], 3).is_err(), "for good");
    drop(workers);
    handle.abort();
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
    let events = library.events();
    assert!(events.contains(&Event::Aborted(0)) && !events.contains(&Event::Destroyed(0)), "{events:?}");
}

#[test]
fn a_peer_that_is_killed_is_named_and_the_others_abort() {
    let Fleet { library, mut workers } = Fleet::new(3, 3, &[]);
    let started = Instant::now();
    // An abort closes the sockets without a goodbye, as a killed process does.
    abort_handle(&workers[2]).abort();
    workers.truncate(2);
    // Whoever ends before the other has looked is lost to it too.
    let both_know = Barrier::new(2);
    on_every(workers, &|mut worker| {
        let message = begin_and_wait(&mut worker, 3).unwrap_err().to_string();
        both_know.wait();
        assert_eq!(message, "lost the connection to worker w2 (rank 2): it closed the connection");
    });
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
    let events = library.events();
    assert!([0, 1, 2].iter().all(|rank| events.contains(&Event::Aborted(*rank))), "{events:?}");
}

#[test]
fn silence_has_a_limit() {
    // The other worker is there and does nothing.
    let Fleet { library, mut workers } = Fleet::within(Duration::from_secs(1), 2, 2, &[]);
    let message = begin_and_wait(&mut workers[0], 2).unwrap_err().to_string();
    assert_eq!(message, "NCCL: the numbers of a step did not arrive for 1 s");
    drop(workers);
    assert!(library.events().contains(&Event::Aborted(0)));
}

#[test]
fn an_error_of_the_library_ends_the_operation_in_its_words() {
    let Fleet { library, workers } = Fleet::new(2, 2, &[Fault::Fails(0, 1)]);
    on_every(workers, &|mut worker| {
        let error = begin_and_wait(&mut worker, 2).unwrap_err();
        if worker.rank == 0 {
            assert_eq!(error.to_string(), "NCCL: unhandled cuda error");
            abort_handle(&worker).abort(); // What the coordinator does next; its sockets close.
        }
    });
    let events = library.events();
    assert!(events.contains(&Event::Aborted(0)) && events.contains(&Event::Aborted(1)), "{events:?}");
}

#[test]
fn a_communicator_that_does_not_form_is_given_up_or_aborted() {
    let memories = Memories::default();
    let library = FakeNccl::new(&memories, &[Fault::NeverForms]);
    for worker in form(&library, &memories, Duration::from_secs(1), fleet(2, 2, SILENCE_LIMIT)) {
        let error = worker.err().expect("it cannot form").to_string();
        // Whoever gives up first closes its sockets.
        assert!(
            error == "NCCL: the communicator did not form for 1 s"
                || error.starts_with("lost the connection"),
            "{error}"
        );
    }
    let library = FakeNccl::new(&memories, &[Fault::NeverForms]);
    let mut meshes = fleet(2, 2, SILENCE_LIMIT);
    let handle = Collective::<FakeGpu>::abort_handle(&meshes[0]);
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            handle.abort();
        });
        meshes.pop();
        let error = form(&library, &memories, SILENCE_LIMIT, meshes).pop().unwrap().err().unwrap();
        assert!(matches!(error, CollectiveError::Aborted), "{error}");
    });
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
    assert_eq!(library.events(), [Event::Begun(0), Event::Aborted(0)]);
}

#[test]
fn a_communicator_that_does_not_end_in_peace_is_aborted() {
    let Fleet { library, workers } = Fleet::new(2, 2, &[Fault::NeverEnds(1)]);
    let started = Instant::now();
    let both_have_it = Barrier::new(2);
    on_every(workers, &|mut worker| {
        let sum = begin_and_wait(&mut worker, 2);
        both_have_it.wait();
        sum.unwrap();
    });
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
    let events = library.events();
    assert!(events.contains(&Event::Aborted(0)) && events.contains(&Event::Aborted(1)), "{events:?}");
}

/// Begins a gather of one number of each of two workers.
fn begin_gather(Worker { gpu, collective, .. }: &mut Worker<Nccl>) -> Begun {
    let buffer = on_gpu(gpu, &[0.0; 2]);
    (collective.begin_gather(gpu, &buffer, vec![0..1, 1..2]), buffer)
}

#[test]
fn what_is_under_way_at_the_end_is_aborted_before_its_buffers_go() {
    type Begin = fn(&mut Worker<Nccl>) -> Vec<Begun>;
    let ways: [(&str, Begin); 4] = [
        ("a reduction", |worker| vec![begin(worker, 2)]),
        ("a reduction that is added, and another", |worker| vec![begin(worker, 2), begin(worker, 2)]),
        ("a gather that is put off", |worker| vec![begin_gather(worker)]),
        ("a gather and a reduction", |worker| vec![begin_gather(worker), begin(worker, 2)]),
    ];
    let slow = Duration::from_millis(200);
    for (way, begin) in ways {
        let Fleet { library, workers } = Fleet::new(2, 2, &[0, 1].map(|rank| Fault::SlowAbort(rank, slow)));
        let all_have_begun = Barrier::new(2);
        on_every(workers, &|mut worker| {
            let begun = begin(&mut worker);
            all_have_begun.wait();
            assert!(begun.iter().all(|(ticket, _)| ticket.is_ok()), "{way}");
            let started = Instant::now();
            drop(worker.collective);
            let took = started.elapsed();
            assert!(slow <= took && took < SOON, "{way}: it took {took:?}");
        });
        // An abort that finds a buffer gone panics, and is none.
        let events = library.events();
        let aborted =
            |rank| events.contains(&Event::Aborted(rank)) && !events.contains(&Event::Destroyed(rank));
        assert!(aborted(0) && aborted(1), "{way}: {events:?}");
    }
}

#[test]
fn whoever_waits_for_a_worker_that_ends_with_operations_under_way_is_told() {
    let Fleet { library, workers } = Fleet::new(2, 2, &[]);
    let started = Instant::now();
    on_every(workers, &|mut worker| {
        if worker.rank == 0 {
            begin(&mut worker, 2).0.unwrap();
        } else {
            let message = begin_and_wait(&mut worker, 2).unwrap_err().to_string();
            assert!(message.starts_with("lost the connection to worker w0 (rank 0)"), "{message}");
        }
    });
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
    let events = library.events();
    assert!(events.contains(&Event::Aborted(0)) && events.contains(&Event::Aborted(1)), "{events:?}");
}

/// What the workers of a fleet make of what they bring, by rank: an id, or why there is none.
fn negotiated(library: &FakeNccl, brought: Vec<Result<(Version, GpuId), String>>) -> Vec<Result<(), String>> {
    let world_size = brought.len() as u32;
    thread::scope(|scope| {
        let form = |(tcp, own): (TcpCollective, Result<(Version, GpuId), String>)| {
            let own = own.map(|(version, gpu)| {
                let library = library.of_version(version);
                Own { library, gpu, shares: false }
            });
            scope.spawn(move || match negotiate::<_, FakeGpu>(tcp, own, 0, SILENCE_LIMIT).unwrap() {
                Formed::Nccl(_) => Ok(()),
                Formed::Tcp(mut tcp, why) => {
                    // The mesh goes on as if nothing had been asked.
                    Collective::<FakeGpu>::exchange(&mut tcp, b"x").unwrap();
                    Err(why)
                }
            })
        };
        let meshes = fleet(world_size, world_size, SILENCE_LIMIT);
        let threads: Vec<_> = meshes.into_iter().zip(brought).map(form).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn all_members_use_nccl_or_none_does_and_all_know_why() {
    let library = FakeNccl::new(&Memories::default(), &[]);
    let version = library.version;
    let brings = |gpu: u8| Ok((version, [gpu; 16]));
    // Each generation has a communicator of its own: joining one twice is a panic of the library.
    for world_size in [1u8, 2, 4, 3] {
        let all = negotiated(&library, (0..world_size).map(brings).collect());
        assert_eq!(all, vec![Ok(()); world_size.into()]);
    }
    let all_say = |brought: Vec<_>, why: &str| {
        let world_size = brought.len();
        assert_eq!(negotiated(&library, brought), vec![Err(why.to_owned()); world_size]);
    };
    let missing = "there is no libnccl.so.2 in /usr/lib";
    all_say(vec![brings(0), Err(missing.to_owned()), brings(2)], &format!("worker w1: {missing}"));
    all_say(vec![brings(0), brings(0)], "workers w0 and w1 are on one device");
    all_say(vec![brings(0), Ok((OLDEST, [1; 16]))], "worker w0 has NCCL 2.23.4, worker w1 has 2.18.1");
}
