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

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind};

const PREFIX_BYTES: usize = 4;
const OVERHEAD_BYTES: usize = PREFIX_BYTES + BulkHeader::BYTES;
const BYTES_FLAG: u64 = 1 << 31;

/// Bytes of the data plane of one process, over all generations, frame headers included: for metrics.
#[derive(Debug, Default)]
pub struct DataPlaneBytes {
    sent: AtomicU64,
    received: AtomicU64,
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

/// A frame as it came in; borrows the connection's buffer.
#[derive(Debug)]
pub(super) struct Incoming<'a> {
    pub(super) generation: u64,
    pub(super) address: Address,
    pub(super) is_bytes: bool,
    pub(super) payload: &'a [u8],
}

/// Little-endian floats, which replace `values`.
pub(super) fn decode_floats(payload: &[u8], values: &mut Vec<f32>) -> Result<(), String> {
    let (words, rest) = payload.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("a payload of {} bytes, expected floats", payload.len()));
    }
    values.clear();
    values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
    Ok(())
}

/// Writes frames to one peer. Keeps one buffer, so that a frame is one system call and no allocation.
#[derive(Debug)]
pub(super) struct FrameWriter<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) generation: u64,
    pub(super) bytes: &'a DataPlaneBytes,
    pub(super) buffer: Vec<u8>,
}

impl FrameWriter<'_> {
    pub(super) fn write(&mut self, address: Address, payload: &Payload) -> io::Result<()> {
        let length = match payload {
            Payload::Floats(values) => 4 * values.len(),
            Payload::Bytes(bytes) => bytes.len(),
        };
        assert!(length <= BULK_CHUNK_BYTES, "a payload of {length} bytes, at most {BULK_CHUNK_BYTES} fit");
        let end = OVERHEAD_BYTES + length;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        let (overhead, body) = self.buffer[..end].split_at_mut(OVERHEAD_BYTES);
        match payload {
            Payload::Floats(values) => {
                for (word, value) in body.as_chunks_mut::<4>().0.iter_mut().zip(&values[..]) {
                    *word = value.to_le_bytes();
                }
            }
            Payload::Bytes(bytes) => body.copy_from_slice(bytes),
        }
        let header = address.header(self.generation, matches!(payload, Payload::Bytes(_)));
        overhead[..PREFIX_BYTES].copy_from_slice(&((BulkHeader::BYTES + length) as u32).to_be_bytes());
        overhead[PREFIX_BYTES..].copy_from_slice(&header.encode(body));
        self.stream.write_all(&self.buffer[..end])?;
        self.bytes.sent.fetch_add(end as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Reads frames of one peer into one buffer.
#[derive(Debug)]
pub(super) struct FrameReader<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) bytes: &'a DataPlaneBytes,
    pub(super) buffer: Vec<u8>,
}

impl FrameReader<'_> {
    /// The next frame. An end of stream, even between two frames, is an error.
    pub(super) fn read(&mut self) -> io::Result<Incoming<'_>> {
        if self.buffer.len() < OVERHEAD_BYTES {
            self.buffer.resize(OVERHEAD_BYTES, 0);
        }
        self.stream.read_exact(&mut self.buffer[..OVERHEAD_BYTES])?;
        let prefix = u32::from_be_bytes(std::array::from_fn(|i| self.buffer[i])) as usize;
        if !(BulkHeader::BYTES..=BulkHeader::BYTES + BULK_CHUNK_BYTES).contains(&prefix) {
            return Err(io::Error::other(format!("a frame of {prefix} bytes where bulk data was expected")));
        }
        let end = PREFIX_BYTES + prefix;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        self.stream.read_exact(&mut self.buffer[OVERHEAD_BYTES..end])?;
        self.bytes.received.fetch_add(end as u64, Ordering::Relaxed);
        let (header, payload) =
            BulkHeader::decode(&self.buffer[PREFIX_BYTES..end]).map_err(io::Error::other)?;
        let (address, is_bytes) = Address::of(&header);
        Ok(Incoming { generation: header.generation, address, is_bytes, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let opener = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (opener, listener.accept().unwrap().0)
    }

    #[test]
    fn a_frame_has_these_bytes() {
        let (opener, mut answerer) = pair();
        let bytes = DataPlaneBytes::default();
        let mut writer = FrameWriter { stream: &opener, generation: 3, bytes: &bytes, buffer: Vec::new() };
        let address = Address { kind: BulkKind::Reduce, ticket: 5, place: 7, block: 9 };
        writer.write(address, &Payload::Floats(Arc::new(vec![1.0]))).unwrap();
        let mut got = [0; 45];
        answerer.read_exact(&mut got).unwrap();
        let golden = [
            &[0, 0, 0, 41, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0][..],
            &[7, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0],
            &got[37..41],
            &[0, 0, 0x80, 0x3f],
        ];
        assert_eq!(got[..], golden.concat());
        assert_eq!(bytes.sent(), 45);
    }

    #[test]
    fn addresses_and_payloads_come_back() {
        let (opener, answerer) = pair();
        let bytes = DataPlaneBytes::default();
        let mut writer = FrameWriter { stream: &opener, generation: 1, bytes: &bytes, buffer: Vec::new() };
        let mut reader = FrameReader { stream: &answerer, bytes: &bytes, buffer: Vec::new() };
        let address = Address { kind: BulkKind::Gather, ticket: u32::MAX - 1, place: 3, block: 1 };
        for (address, payload) in [
            (address, Payload::Bytes(Arc::new(b"abc".to_vec()))),
            (address, Payload::Floats(Arc::new(vec![f32::NAN, -0.0]))),
            (Address::GOODBYE, Payload::Bytes(Arc::default())),
        ] {
            writer.write(address, &payload).unwrap();
            let got = reader.read().unwrap();
            assert_eq!((got.generation, got.address), (1, address));
            match payload {
                Payload::Bytes(expected) => assert!(got.is_bytes && got.payload == &expected[..]),
                Payload::Floats(expected) => {
                    let mut values = Vec::new();
                    decode_floats(got.payload, &mut values).unwrap();
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&values), bits(&expected));
                }
            }
        }
        assert_eq!(bytes.sent(), bytes.received());
    }

    #[test]
    fn damage_and_strange_lengths_are_refused() {
        let refusal = |sent: &[u8]| {
            let (mut opener, answerer) = pair();
            opener.write_all(sent).unwrap();
            drop(opener);
            let bytes = DataPlaneBytes::default();
            let mut reader = FrameReader { stream: &answerer, bytes: &bytes, buffer: Vec::new() };
            reader.read().unwrap_err().to_string()
        };
        let message = refusal(&[0xff; 60]);
        assert_eq!(message, "a frame of 4294967295 bytes where bulk data was expected");
        let mut damaged = vec![0, 0, 0, 41];
        damaged.extend(Address::GOODBYE.header(1, false).encode(&[1, 2, 3, 4]));
        damaged.extend([1, 2, 3, 5]);
        assert!(refusal(&damaged).starts_with("a bulk frame damaged on its way"));
    }
}
