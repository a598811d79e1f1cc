//! The collective over NCCL: gradients never leave the devices, and nothing but the tree decides how they are added.
//!
//! | step of a reduction | by | where |
//! |---|---|---|
//! | each rank's nodes, one slice to each rank, its own included | grouped send and receive | `begin_reduce` |
//! | the nodes of a slice added in tree order | [`Device::tree_sum`] | the next `begin_reduce`, or `wait` |
//! | the finished slices to all | all-gather | there too |
//!
//! NCCL only moves numbers: the sums, hence the bits, are those of TCP. What does not divide into equal slices, fewer than
//! [`ALIGN_FLOATS`] floats for each rank, is sent to everybody and added by everybody.
//!
//! All ranks must enqueue the same operations in the same order, so nothing here depends on what has arrived: the second
//! half of a reduction comes when the next one begins, by which time the device has computed the whole next bucket.
//! A gather of parts is enqueued with whatever comes next, so it costs no synchronisation of its own.
//!
//! **Who waits.** The host waits for the device before NCCL may read what it has computed, and for NCCL before the device
//! may read what has arrived. No call to NCCL waits: the training thread asks again and again, and looks at the
//! connections of the mesh and at the abort flag between. A peer that is killed is noticed there; NCCL would wait for it
//! for ever.
//!
//! **After a fault** the communicator is aborted, never destroyed, and never used again. That happens on a thread of its
//! own: it may take a while, and the training thread may sit in a call of the device until it is done.

mod ending;
pub mod offer;

#[cfg(test)]
mod fake_gpu;
#[cfg(test)]
mod fake_library;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::nccl::{Communicator, Direction, NcclError, NcclLibrary, State, Transfer, UniqueId};
use model::device::{CudaMemory, Device, DeviceError};
use protocol::tree::TreeNode;

use super::reduce::{ALIGN_FLOATS, Plan};
use super::tcp::TcpCollective;
use super::{AbortHandle, Collective, CollectiveError, Result, Ticket};
use ending::Ending;
use offer::{GpuId, Offer, Said};

const FLOAT_BYTES: u64 = 4;

/// How long the training thread asks without a pause.
const RESTLESS: Duration = Duration::from_micros(200);

/// How long it sleeps between two questions after that.
const PAUSE: Duration = Duration::from_micros(50);

/// How long a communicator may take to end in peace; it is aborted then.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The collective of one generation. `B` is the device's buffer.
pub struct NcclCollective<C: Communicator, B> {
    communicator: Arc<Ending<C>>,
    /// Carries small messages, and shows when a peer is gone.
    tcp: TcpCollective,
    rank: u32,
    plan: Plan,
    timeout: Duration,
    /// What arrives to be added, one buffer for each node of the plan; as long as the longest slice so far.
    arrived: Vec<B>,
    arrived_len: usize,
    /// The reduction whose slice is not added yet.
    summing: Option<Summing>,
    /// Transfers that are enqueued with whatever comes next.
    pending: Vec<Transfer>,
    next_ticket: u32,
    /// Operations before this one are finished.
    finished: u32,
}

/// How a bucket is cut: equal slices, one for each rank, and a rest that everybody adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    slice: usize,
    rest: usize,
}

impl Cut {
    fn new(len: usize, world_size: usize) -> Self {
        let slice = len / world_size / ALIGN_FLOATS * ALIGN_FLOATS;
        Self { slice, rest: len - slice * world_size }
    }
}

/// The second half of a reduction.
#[derive(Debug, Clone, Copy)]
struct Summing {
    cut: Cut,
    /// Where the bucket's sum goes.
    into: u64,
}

impl<C: Communicator, B> NcclCollective<C, B> {
    /// Makes a communicator of all members of a mesh and waits until it stands. All must do so, with the same `id`.
    /// `timeout` is how long anything may take that waits for a peer.
    ///
    /// # Errors
    /// NCCL or a peer failed, or the generation was aborted. The communicator is aborted then.
    pub fn form<L>(
        tcp: TcpCollective,
        library: &L,
        id: &UniqueId,
        device: usize,
        timeout: Duration,
    ) -> Result<Self>
    where
        L: NcclLibrary<Communicator = C>,
    {
        let (rank, plan) = (tcp.rank(), tcp.plan().clone());
        let communicator = library.begin(device, id, rank, tcp.ranks())?;
        let formed = Self {
            communicator: Arc::new(Ending::new(communicator)),
            tcp,
            rank,
            plan,
            timeout,
            arrived: Vec::new(),
            arrived_len: 0,
            summing: None,
            pending: Vec::new(),
            next_ticket: 0,
            finished: 0,
        };
        formed.settle("the communicator did not form").map_err(|error| formed.fault(error))?;
        Ok(formed)
    }

    fn ranks(&self) -> u32 {
        self.tcp.ranks()
    }

    /// Whatever has failed: the communicator is of no use any more.
    fn fault(&self, error: CollectiveError) -> CollectiveError {
        self.communicator.abort();
        error
    }

    /// Asks until it is so.
    fn until(
        &self,
        limit: Duration,
        otherwise: &str,
        mut is_so: impl FnMut(&C) -> Result<bool>,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            self.tcp.check()?;
            if is_so(self.communicator.get())? {
                return Ok(());
            }
            let waited = started.elapsed();
            if waited >= limit {
                return Err(CollectiveError::Nccl(format!("{otherwise} for {} s", limit.as_secs())));
            }
            if waited < RESTLESS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Waits until the last call is taken, which comes before any other call.
    fn settle(&self, otherwise: &str) -> Result<()> {
        self.until(self.timeout, otherwise, is_ready)
    }

    /// Waits until everything has moved that was enqueued.
    fn wait_idle(&self) -> Result<()> {
        self.until(self.timeout, "the numbers of a step did not arrive", |communicator| {
            Ok(is_ready(communicator)? && communicator.is_idle()?)
        })
    }

    fn transfer(&self, transfers: &[Transfer]) -> Result<()> {
        if transfers.is_empty() {
            return Ok(());
        }
        self.communicator.get().transfer(transfers)?;
        self.settle("a transfer was not taken")
    }

    /// Enqueues what was put off.
    fn transfer_pending(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.transfer(&pending)
    }

    fn new_ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket - 1)
    }

    /// Sends this rank's nodes of each slice to the slice's owner, and receives all nodes of its own.
    fn scatter(&self, cut: Cut, own: &[u64], arrived: &[u64]) -> Vec<Transfer> {
        let Cut { slice, rest } = cut;
        let slices = slice as u64 * FLOAT_BYTES;
        let rest_at = slices * u64::from(self.ranks());
        let mut transfers = Vec::new();
        let mut push = |direction, address, floats, peer| {
            if floats > 0 {
                transfers.push(Transfer { direction, address, floats, peer });
            }
        };
        for peer in 0..self.ranks() {
            for node in own {
                push(Direction::Send, node + slices * u64::from(peer), slice, peer);
                push(Direction::Send, node + rest_at, rest, peer);
            }
        }
        for ((peer, _), node) in self.plan.nodes().iter().zip(arrived) {
            push(Direction::Receive, *node, slice, *peer);
            push(Direction::Receive, node + slices, rest, *peer);
        }
        transfers
    }
}

/// Both halves of a reduction.
impl<C: Communicator, B> NcclCollective<C, B> {
    fn begin_sum<D: Device<Buffer = B>>(
        &mut self,
        device: &D,
        bucket: Range<usize>,
        nodes: &[(TreeNode, &B)],
        into: &B,
    ) -> Result<()> {
        let memory = memory(device)?;
        if self.summing.is_some() {
            self.finish_sum(device)?;
        } else {
            memory.synchronize()?;
        }
        self.transfer_pending()?;
        let cut = Cut::new(bucket.len(), self.ranks() as usize);
        self.make_room(device, cut.slice + cut.rest)?;
        let at =
            |buffer: &B| Ok::<u64, DeviceError>(memory.address(buffer)? + bucket.start as u64 * FLOAT_BYTES);
        let own: Vec<u64> =
            nodes.iter().map(|(_, buffer)| at(buffer)).collect::<std::result::Result<_, _>>()?;
        let arrived: Vec<u64> = self
            .arrived
            .iter()
            .map(|buffer| memory.address(buffer))
            .collect::<std::result::Result<_, _>>()?;
        self.transfer(&self.scatter(cut, &own, &arrived))?;
        self.summing = Some(Summing { cut, into: at(into)? });
        Ok(())
    }

    /// Adds what has arrived and sends the sum to all. The device has then run all that was enqueued on it.
    fn finish_sum<D: Device<Buffer = B>>(&mut self, device: &D) -> Result<()> {
        let Some(Summing { cut: Cut { slice, rest }, into }) = self.summing.take() else { return Ok(()) };
        self.wait_idle()?;
        let memory = memory(device)?;
        device.tree_sum(&mut self.arrived, self.plan.additions(), 0..slice + rest)?;
        memory.synchronize()?;
        let sum = memory.address(&self.arrived[0])?;
        let slices = slice as u64 * FLOAT_BYTES;
        if slice > 0 {
            self.communicator.get().all_gather(sum, into, slice)?;
            self.settle("a gather was not taken")?;
        }
        if rest > 0 {
            let (peer, floats) = (self.rank, rest);
            let rest_at = into + slices * u64::from(self.ranks());
            self.transfer(&[
                Transfer { direction: Direction::Send, address: sum + slices, floats, peer },
                Transfer { direction: Direction::Receive, address: rest_at, floats, peer },
            ])?;
        }
        Ok(())
    }

    /// Makes sure that as many floats of each node can arrive.
    fn make_room<D: Device<Buffer = B>>(&mut self, device: &D, len: usize) -> Result<()> {
        if len > self.arrived_len {
            self.wait_idle()?; // The last sum may still be read from there.
            self.arrived.clear();
            for _ in self.plan.nodes() {
                self.arrived.push(device.zeros(len)?);
            }
            self.arrived_len = len;
            // What fills them with zeros must not come after what arrives.
            memory(device)?.synchronize()?;
        }
        Ok(())
    }

    fn finish_all<D: Device<Buffer = B>>(&mut self, device: &D) -> Result<()> {
        if !self.pending.is_empty() {
            memory(device)?.synchronize()?;
            self.transfer_pending()?;
        }
        self.finish_sum(device)?;
        self.wait_idle()?;
        self.finished = self.next_ticket;
        Ok(())
    }
}

impl<D: Device, C: Communicator> Collective<D> for NcclCollective<C, D::Buffer> {
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
        let cover = self.plan.nodes_of(self.rank).map(|(node, _)| node);
        assert!(cover.eq(nodes.iter().map(|(node, _)| *node)), "begin_reduce: nodes are not the cover");
        self.begin_sum(device, bucket, nodes, into).map_err(|error| self.fault(error))?;
        Ok(self.new_ticket())
    }

    fn begin_gather(&mut self, device: &D, buffer: &D::Buffer, parts: Vec<Range<usize>>) -> Result<Ticket> {
        assert_eq!(parts.len(), self.ranks() as usize, "begin_gather: one part per rank");
        let start = memory(device)?.address(buffer)?;
        let own = parts[self.rank as usize].clone();
        for (peer, part) in (0..).zip(parts).filter(|(peer, _)| *peer != self.rank) {
            for (direction, part) in [(Direction::Send, own.clone()), (Direction::Receive, part)] {
                let (address, floats) = (start + part.start as u64 * FLOAT_BYTES, part.len());
                if floats > 0 {
                    self.pending.push(Transfer { direction, address, floats, peer });
                }
            }
        }
        Ok(self.new_ticket())
    }

    fn wait(&mut self, device: &D, ticket: Ticket, _: &mut D::Buffer) -> Result<()> {
        if ticket.0 >= self.finished {
            self.finish_all(device).map_err(|error| self.fault(error))?;
        }
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Collective::<D>::exchange(&mut self.tcp, own).map_err(|error| self.fault(error))
    }

    fn abort_handle(&self) -> AbortHandle {
        let mesh = Collective::<D>::abort_handle(&self.tcp);
        let communicator = Arc::downgrade(&self.communicator);
        AbortHandle::new(move || {
            mesh.abort();
            if let Some(communicator) = communicator.upgrade() {
                communicator.abort();
            }
        })
    }
}

impl<C: Communicator, B> Drop for NcclCollective<C, B> {
    fn drop(&mut self) {
        let is_at_rest = self.finished == self.next_ticket && !self.communicator.is_ending();
        let ended = is_at_rest
            && self.communicator.get().finalize().is_ok()
            && self.until(END_LIMIT, "", is_ready).is_ok();
        if ended {
            self.communicator.get().destroy();
        } else {
            self.communicator.abort();
            // Peers are in the middle of an operation, which NCCL does not tell them: a farewell in peace would let them wait.
            self.tcp.abort();
        }
        // The buffers must outlive what reads and writes them.
        self.communicator.wait();
    }
}

impl From<NcclError> for CollectiveError {
    fn from(error: NcclError) -> Self {
        match error {
            NcclError::Aborted => Self::Aborted,
            other => Self::Nccl(other.to_string()),
        }
    }
}

/// What a worker brings to a communicator.
pub struct Own<L> {
    /// The library.
    pub library: L,
    /// Its device.
    pub gpu: GpuId,
    /// Whether it may share the device with another member.
    pub shares: bool,
}

/// What the members of a generation have agreed on.
pub enum Formed<C: Communicator, B> {
    /// All can use NCCL.
    Nccl(NcclCollective<C, B>),
    /// Somebody cannot, and why, in words: the same on all.
    Tcp(TcpCollective, String),
}

/// Agrees with the others on NCCL, and forms a communicator if all can be part of it. `own` is what this worker brings, or
/// why it cannot.
///
/// # Errors
/// A peer or NCCL failed, or the generation was aborted.
pub fn negotiate<L, D>(
    mut tcp: TcpCollective,
    own: std::result::Result<Own<L>, String>,
    device: usize,
    timeout: Duration,
) -> Result<Formed<L::Communicator, D::Buffer>>
where
    L: NcclLibrary,
    D: Device,
{
    let is_first = tcp.rank() == 0;
    let said: Said = own.as_ref().map_err(String::clone).and_then(|Own { library, gpu, shares }| {
        let id = is_first.then(|| library.unique_id()).transpose().map_err(|error| error.to_string())?;
        Ok(Offer { version: library.version(), gpu: *gpu, shares: *shares, id })
    });
    let everybodys = Collective::<D>::exchange(&mut tcp, &offer::encode(&said))?;
    let names: Vec<&str> = tcp.members().iter().map(|member| member.name.as_str()).collect();
    let garbled = || Err("it said something else than what it brings to NCCL".to_owned());
    let said: Vec<Said> =
        everybodys.iter().map(|bytes| offer::decode(bytes).unwrap_or_else(garbled)).collect();
    match (offer::agree(&names, &said), own) {
        (Ok(id), Ok(own)) => Ok(Formed::Nccl(NcclCollective::form(tcp, &own.library, &id, device, timeout)?)),
        (Err(why), _) | (Ok(_), Err(why)) => Ok(Formed::Tcp(tcp, why)),
    }
}

fn memory<D: Device>(device: &D) -> Result<&dyn CudaMemory<D::Buffer>> {
    device.cuda().ok_or_else(|| DeviceError("NCCL needs the memory of a CUDA device".to_owned()).into())
}

fn is_ready<C: Communicator>(communicator: &C) -> Result<bool> {
    match communicator.state() {
        State::Ready => Ok(true),
        State::InProgress => Ok(false),
        State::Failed(cause) => Err(CollectiveError::Nccl(cause)),
    }
}
