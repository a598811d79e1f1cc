//! One frame of the data plane: which part of which operation it carries, its bytes, and their count.
//!
//! ```text
//! u32 big-endian length | BulkHeader | payload: floats, little-endian; or bytes
//! ```
//! | header field | meaning here |
//! |---|---|
//! | `kind` | `Reduce`: a node's values of one block, to the owner of the slice; `Gather`: finished values, to all |
//! | `generation` | of the mesh; frames of another one are dropped |
//! | `step` | 0: the ticket counts operations, and a generation's tickets are never used again |
//! | `sequence` | block of the slice |
//! | `tag` | bits 63‥32 ticket, bit 31 whether the payload is bytes instead of floats, bits 30‥0 place |
//!
//! The place is the leftmost leaf of the node (`Reduce`) or the sender's rank (`Gather`).

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind, Expected};
use transport::DataStream;

use super::reduce::block_range;

const PREFIX_BYTES: usize = 4;
const OVERHEAD_BYTES: usize = PREFIX_BYTES + BulkHeader::BYTES;
const BYTES_FLAG: u64 = 1 << 31;

/// What the data plane of one process has done: bytes over all generations, frame headers included, for metrics; and
/// where this generation is.
#[derive(Debug, Default)]
pub struct DataPlaneBytes {
    sent: AtomicU64,
    received: AtomicU64,
    operations: AtomicU32,
    /// One more than the rank of the peer that is waited for; 0 if none is.
    waits_for: AtomicU32,
}

impl DataPlaneBytes {
    /// Bytes handed to the sockets.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes taken from the sockets.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Collective operations entered in this generation.
    pub fn operations(&self) -> u32 {
        self.operations.load(Ordering::Relaxed)
    }

    /// The rank of the peer that the training thread waits for.
    pub fn waits_for(&self) -> Option<u32> {
        self.waits_for.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(crate) fn begin_generation(&self) {
        self.operations.store(0, Ordering::Relaxed);
        self.wait_for(None);
    }

    pub(super) fn add_operation(&self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn wait_for(&self, rank: Option<u32>) {
        self.waits_for.store(rank.map_or(0, |rank| rank + 1), Ordering::Relaxed);
    }

    pub(super) fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Which part of which operation a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) kind: BulkKind,
    pub(super) ticket: u32,
    pub(super) place: u32,
    pub(super) block: u32,
}

impl Address {
    /// The last frame of a worker that leaves in peace: its end of stream is then no loss.
    pub(super) const GOODBYE: Self =
        Self { kind: BulkKind::Gather, ticket: u32::MAX, place: u32::MAX >> 1, block: u32::MAX };

    fn header(self, generation: u64, is_bytes: bool) -> BulkHeader {
        debug_assert!(u64::from(self.place) < BYTES_FLAG, "a place has 31 bits");
        let flag = if is_bytes { BYTES_FLAG } else { 0 };
        let tag = u64::from(self.ticket) << 32 | flag | u64::from(self.place);
        BulkHeader { kind: self.kind, generation, step: 0, sequence: self.block, tag }
    }

    fn of(header: &BulkHeader) -> (Self, bool) {
        let place = (header.tag & (BYTES_FLAG - 1)) as u32;
        let ticket = (header.tag >> 32) as u32;
        (Self { kind: header.kind, ticket, place, block: header.sequence }, header.tag & BYTES_FLAG != 0)
    }
}

/// What a frame carries. Shared, because the same values go to several peers.
#[derive(Debug, Clone)]
pub(super) enum Payload {
    Floats(Arc<Vec<f32>>),
    Bytes(Arc<Vec<u8>>),
}

const _: () =
    assert!(cfg!(target_endian = "little"), "floats travel little-endian, as they lie in memory here");

impl Payload {
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Floats(values) => bytemuck::cast_slice(values),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// One frame on its way out: what precedes its payload, and how much of both is sent. The payload stays where it is.
#[derive(Debug, Clone)]
pub(super) struct Outgoing {
    overhead: [u8; OVERHEAD_BYTES],
    /// Bytes of both that the stream has taken.
    sent: usize,
}

impl Outgoing {
    pub(super) fn new(generation: u64, address: Address, is_bytes: bool, payload: &[u8]) -> Self {
        assert!(payload.len() <= BULK_CHUNK_BYTES, "a payload of {} bytes", payload.len());
        let header = address.header(generation, is_bytes).encode(payload);
        let mut overhead = [0; OVERHEAD_BYTES];
        overhead[..PREFIX_BYTES].copy_from_slice(&((BulkHeader::BYTES + payload.len()) as u32).to_be_bytes());
        overhead[PREFIX_BYTES..].copy_from_slice(&header);
        Self { overhead, sent: 0 }
    }

    /// Writes until all of it is sent or, if it must not wait, the stream takes no more for the moment. Gives whether all
    /// of it is sent. The payload must be the one for which the frame was made.
    pub(super) fn send(&mut self, payload: &[u8], stream: &DataStream, may_wait: bool) -> io::Result<bool> {
        while self.sent < OVERHEAD_BYTES + payload.len() {
            let parts = [
                IoSlice::new(&self.overhead[self.sent.min(OVERHEAD_BYTES)..]),
                IoSlice::new(&payload[self.sent.saturating_sub(OVERHEAD_BYTES)..]),
            ];
            match stream.send(&parts, may_wait)? {
                Some(count) => self.sent += count,
                None => return Ok(false),
            }
        }
        stream.flush(may_wait)
    }

    /// Bytes that the stream has taken.
    pub(super) fn sent(&self) -> usize {
        self.sent
    }
}

/// A frame as it came in.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) generation: u64,
    pub(super) address: Address,
    pub(super) payload: Received,
}

/// What came with a frame; nobody else holds it yet.
#[derive(Debug)]
pub(super) enum Received {
    Floats(Vec<f32>),
    Bytes(Vec<u8>),
    /// Floats that lie where a [`Landing`] wants them.
    Landed(Range<usize>),
}

impl Received {
    fn as_bytes_mut<'a>(&'a mut self, landing: Option<&'a mut Landing<'_>>) -> Option<&'a mut [u8]> {
        match self {
            Self::Floats(values) => Some(bytemuck::cast_slice_mut(values)),
            Self::Bytes(bytes) => Some(bytes),
            Self::Landed(range) => Some(bytemuck::cast_slice_mut(&mut landing?.values[range.clone()])),
        }
    }
}

/// Where the finished values of one operation are wanted, for a reader that can put them there itself.
#[derive(Debug)]
pub(super) struct Landing<'a> {
    pub(super) ticket: u32,
    /// By rank: which part of the values comes from it.
    pub(super) parts: &'a [Range<usize>],
    pub(super) values: &'a mut [f32],
}

impl Landing<'_> {
    /// The place of a frame's floats; `None` if they belong to something else, or do not fit.
    fn place(&self, address: Address, floats: usize) -> Option<Range<usize>> {
        let wanted = address.kind == BulkKind::Gather && address.ticket == self.ticket;
        let part = self.parts.get(address.place as usize).filter(|_| wanted)?;
        block_range(part.clone(), address.block).filter(|range| range.len() == floats)
    }
}

/// Reads the frames of one peer, as much of one at a time as has arrived. Floats go straight to the memory in which
/// they will be added.
#[derive(Debug)]
pub(super) struct FrameReader {
    overhead: [u8; OVERHEAD_BYTES],
    /// What the overhead says, once it is all there.
    begun: Option<(BulkHeader, Expected, Received)>,
    /// Bytes of the overhead, later of the payload, that are there.
    filled: usize,
}

impl FrameReader {
    pub(super) fn new() -> Self {
        Self { overhead: [0; OVERHEAD_BYTES], begun: None, filled: 0 }
    }

    /// Takes what has arrived, without waiting: one whole frame, or nothing yet. An end of stream, even between two
    /// frames, is an error. `spare` gives memory for floats that do not belong to the landing, which must be there again
    /// until a frame that began with it is whole.
    pub(super) fn read(
        &mut self,
        stream: &DataStream,
        bytes: &DataPlaneBytes,
        landing: Option<&mut Landing<'_>>,
        spare: impl FnOnce() -> Vec<f32>,
    ) -> io::Result<Option<Incoming>> {
        if self.begun.is_none() {
            if !fill(stream, &mut self.overhead, &mut self.filled)? {
                return Ok(None);
            }
            self.begun = Some(begin(&self.overhead, landing.as_deref(), spare)?);
            self.filled = 0;
        }
        let (_, expected, payload) = self.begun.as_mut().expect("it is there or was just put there");
        let payload = payload
            .as_bytes_mut(landing)
            .ok_or_else(|| io::Error::other("its values are no longer waited for"))?;
        if !fill(stream, payload, &mut self.filled)? {
            return Ok(None);
        }
        expected.check(payload).map_err(io::Error::other)?;
        bytes.received.fetch_add((OVERHEAD_BYTES + payload.len()) as u64, Ordering::Relaxed);
        let (header, _, payload) = self.begun.take().expect("as above");
        self.filled = 0;
        let (address, _) = Address::of(&header);
        Ok(Some(Incoming { generation: header.generation, address, payload }))
    }
}

/// What the first bytes of a frame announce, and the memory for it.
fn begin(
    overhead: &[u8; OVERHEAD_BYTES],
    landing: Option<&Landing<'_>>,
    spare: impl FnOnce() -> Vec<f32>,
) -> io::Result<(BulkHeader, Expected, Received)> {
    let (prefix, header) = overhead.split_first_chunk().expect("the prefix comes first");
    let prefix = u32::from_be_bytes(*prefix) as usize;
    let length = prefix
        .checked_sub(BulkHeader::BYTES)
        .filter(|length| *length <= BULK_CHUNK_BYTES)
        .ok_or_else(|| io::Error::other(format!("a frame of {prefix} bytes where bulk data was expected")))?;
    let header = header.try_into().expect("the header is the rest");
    let (header, expected) = BulkHeader::read(header).map_err(io::Error::other)?;
    let (address, is_bytes) = Address::of(&header);
    let payload = if is_bytes {
        Received::Bytes(vec![0; length])
    } else if !length.is_multiple_of(4) {
        return Err(io::Error::other(format!("a payload of {length} bytes, expected floats")));
    } else if let Some(range) = landing.and_then(|landing| landing.place(address, length / 4)) {
        Received::Landed(range)
    } else {
        let mut values = spare();
        // Nearly all blocks have the same length: there is nothing to fill in.
        values.resize(length / 4, 0.0);
        Received::Floats(values)
    };
    Ok((header, expected, payload))
}

/// Receives into `buffer[*filled..]` what is there; gives whether the buffer is full.
fn fill(stream: &DataStream, buffer: &mut [u8], filled: &mut usize) -> io::Result<bool> {
    while *filled < buffer.len() {
        match stream.receive(&mut buffer[*filled..])? {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => *filled += count,
            None => return Ok(false),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use transport::{Side, Tls};

    fn pair() -> (DataStream, DataStream) {
        pair_of(None)
    }

    fn pair_of(tls: Option<&Tls>) -> (DataStream, DataStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let opener = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let answerer = listener.accept().unwrap().0;
        let until = Instant::now() + Duration::from_secs(60);
        let open = |tcp, side| DataStream::open(tcp, side, tls, until).unwrap();
        std::thread::scope(|scope| {
            let opener = scope.spawn(move || open(opener, Side::Opener));
            let answerer = open(answerer, Side::Answerer);
            (opener.join().unwrap(), answerer)
        })
    }

    fn read(stream: &DataStream, bytes: &DataPlaneBytes) -> io::Result<Incoming> {
        let mut reader = FrameReader::new();
        loop {
            if let Some(frame) = reader.read(stream, bytes, None, || vec![f32::NAN; 9])? {
                return Ok(frame);
            }
            stream.wait_readable(None);
        }
    }

    #[test]
    fn a_frame_has_these_bytes() {
        let (opener, answerer) = pair();
        let address = Address { kind: BulkKind::Reduce, ticket: 5, place: 7, block: 9 };
        let payload = 1f32.to_le_bytes();
        let mut frame = Outgoing::new(3, address, false, &payload);
        assert!(frame.send(&payload, &opener, true).unwrap());
        assert_eq!(frame.sent(), 45);
        let mut got = [0; 45];
        answerer.tcp().read_exact(&mut got).unwrap();
        let golden = [
            &[0, 0, 0, 41, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0][..],
            &[7, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0],
            &got[37..41],
            &[0, 0, 0x80, 0x3f],
        ];
        assert_eq!(got[..], golden.concat());
    }

    #[test]
    fn addresses_and_payloads_come_back() {
        let (opener, answerer) = pair();
        let bytes = DataPlaneBytes::default();
        let address = Address { kind: BulkKind::Gather, ticket: u32::MAX - 1, place: 3, block: 1 };
        let mut sent = 0;
        for (address, payload) in [
            (address, Payload::Bytes(Arc::new(b"abc".to_vec()))),
            (address, Payload::Floats(Arc::new(vec![f32::NAN, -0.0]))),
            (Address::GOODBYE, Payload::Bytes(Arc::default())),
        ] {
            let is_bytes = matches!(payload, Payload::Bytes(_));
            let mut frame = Outgoing::new(1, address, is_bytes, payload.as_bytes());
            assert!(frame.send(payload.as_bytes(), &opener, true).unwrap());
            sent += frame.sent() as u64;
            let got = read(&answerer, &bytes).unwrap();
            assert_eq!((got.generation, got.address), (1, address));
            match (payload, got.payload) {
                (Payload::Bytes(expected), Received::Bytes(got)) => assert_eq!(got, *expected),
                (Payload::Floats(expected), Received::Floats(got)) => {
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&got), bits(&expected));
                }
                (payload, got) => panic!("{payload:?} came back as {got:?}"),
            }
        }
        assert_eq!(bytes.received(), sent);
    }

    #[test]
    fn a_frame_that_the_socket_takes_in_parts_arrives_whole() {
        arrive_whole(&pair());
    }

    #[test]
    fn so_does_one_of_tls() {
        let Ok(text) = transport::new_certificate() else {
            return println!("skipped: frames over TLS: this build has none");
        };
        arrive_whole(&pair_of(Some(&Tls::from_pem(&text, "the text").unwrap())));
    }

    fn arrive_whole((opener, answerer): &(DataStream, DataStream)) {
        let values: Vec<f32> = (0..BULK_CHUNK_BYTES / 4).map(|i| i as f32).collect();
        let new = |ticket| {
            let address = Address { kind: BulkKind::Gather, ticket, place: 0, block: 0 };
            Outgoing::new(1, address, false, bytemuck::cast_slice(&values))
        };
        // Nobody reads: at some point the socket is full, in the middle of a frame or between two.
        let mut frames: Vec<Outgoing> = (0..64).map(new).collect();
        let send =
            |frame: &mut Outgoing, flags| frame.send(bytemuck::cast_slice(&values), opener, flags).unwrap();
        let is_full = |frame: &mut Outgoing| !send(frame, false);
        let taken = frames.iter_mut().position(is_full).expect("no socket takes 64 MiB");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for ticket in 0..64 {
                    let got = read(answerer, &DataPlaneBytes::default()).unwrap();
                    assert_eq!(got.address.ticket, ticket);
                    assert!(matches!(got.payload, Received::Floats(got) if got == values));
                }
            });
            for frame in &mut frames[taken..] {
                assert!(send(frame, true));
            }
        });
    }

    #[test]
    fn values_land_where_they_are_wanted_and_nowhere_else() {
        let (opener, answerer) = pair();
        let mut values = vec![0.0; 10];
        let mut landing = Landing { ticket: 5, parts: &[0..4, 4..10], values: &mut values };
        let block = |ticket, place, block, floats: usize| {
            let address = Address { kind: BulkKind::Gather, ticket, place, block };
            (address, (0..floats).map(|i| i as f32 + 1.0).collect::<Vec<f32>>())
        };
        let mut landed = |(address, floats): (Address, Vec<f32>)| {
            let bytes = bytemuck::cast_slice(&floats);
            assert!(Outgoing::new(1, address, false, bytes).send(bytes, &opener, true).unwrap());
            let mut reader = FrameReader::new();
            loop {
                answerer.wait_readable(None);
                let all = &DataPlaneBytes::default();
                if let Some(frame) = reader.read(&answerer, all, Some(&mut landing), Vec::new).unwrap() {
                    return matches!(frame.payload, Received::Landed(range) if range == (4..10));
                }
            }
        };
        assert!(landed(block(5, 1, 0, 6)));
        assert!(!landed(block(6, 1, 0, 6)), "another operation");
        assert!(!landed(block(5, 1, 1, 6)), "a block that its part does not have");
        assert!(!landed(block(5, 1, 0, 5)), "too short");
        assert!(!landed(block(5, 2, 0, 6)), "no such rank");
        let (reduce, floats) = block(5, 1, 0, 6);
        assert!(!landed((Address { kind: BulkKind::Reduce, ..reduce }, floats)), "addends");
        assert_eq!(values, [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn damage_and_strange_lengths_are_refused() {
        let refusal = |sent: &[u8]| {
            let (opener, answerer) = pair();
            opener.tcp().write_all(sent).unwrap();
            drop(opener);
            read(&answerer, &DataPlaneBytes::default()).unwrap_err().to_string()
        };
        let message = refusal(&[0xff; 60]);
        assert_eq!(message, "a frame of 4294967295 bytes where bulk data was expected");
        let mut damaged = vec![0, 0, 0, 41];
        damaged.extend(Address::GOODBYE.header(1, false).encode(&[1, 2, 3, 4]));
        damaged.extend([1, 2, 3, 5]);
        assert!(refusal(&damaged).starts_with("a bulk frame damaged on its way"));
    }
}
