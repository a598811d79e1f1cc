//! All-reduce and all-gather over TCP between the workers of one generation, staged through host memory.
//!
//! | what travels | from | to | frames |
//! |---|---|---|---|
//! | values of a cover's nodes, one slice | each rank | the slice's owner | `Reduce` |
//! | the finished slice | its owner | all | `Gather` |
//!
//! The training thread hands values out ([`Collective::begin_reduce`]) and takes them in ([`Collective::wait`]); what
//! the sockets do not take at once, and what comes while it computes, is the business of other threads (`links`). With
//! one worker there is no thread and no socket, but the same additions.
//!
//! **Allocation**: the values of blocks live in buffers that are used again, or stay in the device's memory if that is
//! the host's. What is still allocated is small: per operation the ranges of its parts and its list of pieces, per block
//! the list of its nodes, a reference count, and now and then a node of a queue or a map. `exchange` allocates what it
//! returns.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use model::device::Device;
use protocol::frame::{BULK_CHUNK_BYTES, BulkKind};
use protocol::message::Member;
use protocol::tree::TreeNode;

use super::links::{self, Links, Piece};
use super::mesh::Mesh;
use super::reduce::{Plan, Refused, block_count, block_range, blocks, slice};
use super::wire::{Address, Landing, Payload};
use super::{AbortHandle, Collective, Result, Ticket};

pub use super::wire::DataPlaneBytes;

/// How long nothing may come from a worker that others wait for, unless told otherwise.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// The collective of one generation over the streams of a [`Mesh`].
pub struct TcpCollective {
    links: Arc<Links>,
    threads: Vec<JoinHandle<()>>,
    begun: HashMap<u32, Begun>,
    /// Pieces on their way in; kept for its capacity.
    taken: Vec<Piece>,
}

/// An operation that was begun and not yet waited for.
struct Begun {
    /// By rank: which part of the buffer comes from it.
    parts: Vec<Range<usize>>,
    /// By rank: how many blocks are still to come.
    missing: Vec<u32>,
}

impl TcpCollective {
    /// Starts two threads per peer. `timeout` is how long [`Collective::wait`] tolerates silence of a peer it needs.
    ///
    /// # Errors
    /// The operating system gives no threads.
    pub fn new(mesh: Mesh, timeout: Duration, bytes: Arc<DataPlaneBytes>) -> io::Result<Self> {
        let (links, threads) = links::start(mesh, timeout, bytes)?;
        Ok(Self { links, threads, begun: HashMap::new(), taken: Vec::new() })
    }

    pub(super) fn rank(&self) -> u32 {
        self.links.place.rank
    }

    pub(super) fn ranks(&self) -> u32 {
        self.links.place.members.len() as u32
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.links.plan
    }

    /// The members by rank.
    pub(super) fn members(&self) -> &[Member] {
        &self.links.place.members
    }

    /// Ends the operations of all workers, as an [`AbortHandle`] does: peers that wait for this worker are told at once.
    pub(super) fn abort(&self) {
        self.links.abort();
    }

    /// Whether all connections stand and nobody has aborted.
    pub(super) fn check(&self) -> Result<()> {
        self.links.check()
    }

    /// Copies one block from the device.
    fn export<D: Device>(&self, device: &D, buffer: &D::Buffer, range: Range<usize>) -> Result<Vec<f32>> {
        let mut values = self.links.spare();
        // Nearly all blocks have the same length: there is nothing to fill in.
        values.resize(range.len(), 0.0);
        device.export(buffer, range, &mut values)?;
        Ok(values)
    }

    /// Adds this worker's nodes of a block of its own slice to the others': at once and without a copy if these are there
    /// and the device's memory is the host's, else whoever gets the last of them will do it.
    fn add_own<D: Device>(
        &self,
        device: &D,
        (ticket, block): (u32, u32),
        range: Range<usize>,
        nodes: &[(TreeNode, &D::Buffer)],
        into: &mut D::Buffer,
    ) -> Result<()> {
        let refused = |refused| match refused {
            Refused::Length { other, .. } => self.links.peer_lost(other, "it cut the bucket differently"),
            bug => panic!("begin_reduce: {bug}"),
        };
        let own: Option<Vec<&[f32]>> =
            nodes.iter().map(|(_, buffer)| Some(&device.host(buffer)?[range.clone()])).collect();
        if let (Some(own), Some(sum)) = (own, device.host_mut(into))
            && self.links.finish_own(ticket, block, &own, &mut sum[range.clone()]).map_err(refused)?
        {
            return Ok(());
        }
        for ((_, leaf), (_, buffer)) in self.links.plan.nodes_of(self.rank()).zip(nodes) {
            let values = self.export(device, buffer, range.clone())?;
            self.links.deliver(ticket, block, (self.rank(), leaf), values).map_err(refused)?;
        }
        Ok(())
    }

    /// Waits for all pieces of an operation, in whatever order they come.
    fn wait_for(
        &mut self,
        ticket: u32,
        missing: &mut [u32],
        destination: &mut impl Destination,
    ) -> Result<()> {
        let (since, mut reader) = (Instant::now(), None);
        while missing.iter().any(|count| *count > 0) {
            let landing = destination.landing(ticket);
            self.links.take_finished(ticket, missing, since, &mut reader, landing, &mut self.taken)?;
            for Piece { rank, block, payload } in self.taken.drain(..) {
                let count = &mut missing[rank as usize];
                *count = count
                    .checked_sub(1)
                    .ok_or_else(|| self.links.peer_lost(rank, "it sent more blocks than its part has"))?;
                if let Some(payload) = payload {
                    destination
                        .take(rank, block, &payload)?
                        .map_err(|cause| self.links.peer_lost(rank, cause))?;
                    self.links.recycle_payload(payload);
                }
            }
        }
        self.links.forget(ticket);
        Ok(())
    }
}

/// Where the pieces of an operation go.
trait Destination {
    /// Where a reader may put finished floats itself.
    fn landing(&mut self, ticket: u32) -> Option<Landing<'_>>;

    /// Takes one piece of a rank, or says why it does not fit.
    fn take(
        &mut self,
        rank: u32,
        block: u32,
        payload: &Payload,
    ) -> Result<std::result::Result<(), &'static str>>;
}

/// The parts of a device's buffer.
struct Parts<'a, D: Device> {
    device: &'a D,
    buffer: &'a mut D::Buffer,
    by_rank: Vec<Range<usize>>,
}

impl<D: Device> Destination for Parts<'_, D> {
    fn landing(&mut self, ticket: u32) -> Option<Landing<'_>> {
        let values = self.device.host_mut(self.buffer)?;
        Some(Landing { ticket, parts: &self.by_rank, values })
    }

    fn take(
        &mut self,
        rank: u32,
        block: u32,
        payload: &Payload,
    ) -> Result<std::result::Result<(), &'static str>> {
        match (block_range(self.by_rank[rank as usize].clone(), block), payload) {
            (Some(range), Payload::Floats(values)) if values.len() == range.len() => {
                self.device.import(self.buffer, range.start, values)?;
                Ok(Ok(()))
            }
            _ => Ok(Err("a block does not fit its part of the buffer")),
        }
    }
}

/// A few bytes of everybody, by rank.
struct Everybodys(Vec<Vec<u8>>);

impl Destination for Everybodys {
    fn landing(&mut self, _: u32) -> Option<Landing<'_>> {
        None
    }

    fn take(
        &mut self,
        rank: u32,
        _: u32,
        payload: &Payload,
    ) -> Result<std::result::Result<(), &'static str>> {
        let Payload::Bytes(bytes) = payload else {
            return Ok(Err("it sent floats where bytes are exchanged"));
        };
        self.0[rank as usize] = bytes.to_vec();
        Ok(Ok(()))
    }
}

impl<D: Device> Collective<D> for TcpCollective {
    fn world_size(&self) -> u32 {
        self.ranks()
    }

    fn begin_reduce(
        &mut self,
        device: &D,
        bucket: Range<usize>,
        nodes: &[(TreeNode, &D::Buffer)],
        into: &mut D::Buffer,
    ) -> Result<Ticket> {
        let ticket = self.links.next_ticket()?;
        let cover = self.links.plan.nodes_of(self.rank()).map(|(node, _)| node);
        assert!(cover.eq(nodes.iter().map(|(node, _)| *node)), "begin_reduce: nodes are not the cover");
        if self.ranks() == 1 && device.host(into).is_none() {
            // The cover of all shards is the root: its value is the sum, and need not leave the device.
            device.copy(into, nodes[0].1, bucket)?;
            self.begun.insert(ticket, Begun { parts: vec![0..0], missing: vec![0] });
            return Ok(Ticket(ticket));
        }

        let (len, ranks) = (bucket.len(), self.ranks());
        let part = |rank| {
            let slice = slice(len, ranks, rank);
            bucket.start + slice.start..bucket.start + slice.end
        };
        let parts: Vec<_> = (0..ranks).map(part).collect();

        // The peers' slices first, one block of each after the other, and all nodes of a block together.
        let mut reader = None;
        for block in 0..block_count(parts.last().expect("at least this rank").len()) {
            for owner in self.links.peers() {
                let Some(range) = block_range(parts[owner as usize].clone(), block) else { continue };
                for ((_, leaf), (_, buffer)) in self.links.plan.nodes_of(self.rank()).zip(nodes) {
                    let address = Address { kind: BulkKind::Reduce, ticket, place: leaf, block };
                    if let Some(values) = device.host(buffer) {
                        self.links.send_from(owner, address, &values[range.clone()]);
                    } else {
                        let values = self.export(device, buffer, range.clone())?;
                        self.links.send(owner, address, Payload::Floats(Arc::new(values)));
                    }
                }
            }
            self.links.read_arrived(&mut reader);
        }
        // What the peers have sent meanwhile need only be added.
        for (block, range) in (0..).zip(blocks(parts[self.rank() as usize].clone())) {
            self.add_own(device, (ticket, block), range, nodes, into)?;
        }

        let missing = parts.iter().map(|part| block_count(part.len())).collect();
        self.begun.insert(ticket, Begun { parts, missing });
        Ok(Ticket(ticket))
    }

    fn begin_gather(&mut self, device: &D, buffer: &D::Buffer, parts: Vec<Range<usize>>) -> Result<Ticket> {
        assert_eq!(parts.len(), self.ranks() as usize, "begin_gather: one part per rank");
        let ticket = self.links.next_ticket()?;
        let own = self.rank() as usize;
        if self.ranks() > 1 {
            for (block, range) in (0..).zip(blocks(parts[own].clone())) {
                let values = Arc::new(self.export(device, buffer, range)?);
                self.links.send_to_all(ticket, block, &Payload::Floats(values));
            }
        }
        let mut missing: Vec<_> = parts.iter().map(|part| block_count(part.len())).collect();
        missing[own] = 0;
        self.begun.insert(ticket, Begun { parts, missing });
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, device: &D, ticket: Ticket, into: &mut D::Buffer) -> Result<()> {
        let Begun { parts, mut missing } =
            self.begun.remove(&ticket.0).expect("a ticket is waited for once, by whoever began it");
        self.wait_for(ticket.0, &mut missing, &mut Parts { device, buffer: into, by_rank: parts })
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        assert!(own.len() <= BULK_CHUNK_BYTES, "exchange: {} bytes, at most {BULK_CHUNK_BYTES}", own.len());
        let ticket = self.links.next_ticket()?;
        let (rank, ranks) = (self.rank(), self.ranks() as usize);
        let payload = Payload::Bytes(Arc::new(own.to_vec()));
        self.links.send_to_all(ticket, 0, &payload);
        let mut missing = vec![1; ranks];
        missing[rank as usize] = 0;
        let mut everybodys = Everybodys(vec![Vec::new(); ranks]);
        everybodys.0[rank as usize] = own.to_vec();
        self.wait_for(ticket, &mut missing, &mut everybodys)?;
        Ok(everybodys.0)
    }

    fn abort_handle(&self) -> AbortHandle {
        let links = Arc::downgrade(&self.links);
        AbortHandle::new(move || {
            if let Some(links) = links.upgrade() {
                links.abort();
            }
        })
    }
}

impl Drop for TcpCollective {
    fn drop(&mut self) {
        self.links.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}
