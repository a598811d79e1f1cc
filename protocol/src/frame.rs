//! Frames: length-prefixed units of the control connection and of the data plane.
//!
//! A frame is a big-endian u32 length and that many bytes, of which the first is the kind. Control messages are
//! bincode; bulk data (batches, state, gradients) is a fixed header and raw little-endian bytes that are never
//! decoded into a message.

use std::time::Duration;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};
use bytes::{BufMut, Bytes, BytesMut};
use tokio_util::codec::LengthDelimitedCodec;

/// No frame is longer than this.
pub const FRAME_LIMIT_BYTES: usize = 16 << 20;

/// Longest payload of one frame of a state stream. (A batch is always one frame, however long.)
pub const BULK_CHUNK_BYTES: usize = 1 << 20;

/// What was sent on a connection, of either plane, and has not been acknowledged by the other side's kernel for so long
/// ends it: TCP's user timeout. Without it a machine that lost its power keeps a connection for a quarter of an hour.
pub const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(20);

const KIND_MESSAGE: u8 = 0;

/// Why a frame was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The first byte names no kind of frame.
    #[error("a frame of unknown kind {0}")]
    UnknownKind(u8),
    /// The bytes are not one whole message.
    #[error("a frame that is not a message: {0}")]
    Message(String),
    /// The bulk header is cut, or does not fit the payload.
    #[error("a bulk frame whose header does not fit its payload of {0} bytes")]
    Header(usize),
    /// The payload's CRC-32 differs.
    #[error("a bulk frame damaged on its way: checksum {actual:08x}, expected {expected:08x}")]
    Checksum {
        /// In the header.
        expected: u32,
        /// Of the payload.
        actual: u32,
    },
}

/// What the payload of a bulk frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BulkKind {
    /// A [`Batch`](crate::batch::Batch); `tag` is unused.
    Batch = 1,
    /// Part of a state image; `tag` is the byte offset of the part.
    State = 2,
    /// A tree node's values in one bucket; `tag` says which (see the worker's collective).
    Reduce = 3,
    /// Finished values, to all peers; `tag` as for [`Reduce`](Self::Reduce).
    Gather = 4,
}

/// The fixed header of a bulk frame: kind, then these fields little-endian, then length and CRC-32 of the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BulkHeader {
    /// What the payload is.
    pub kind: BulkKind,
    /// The membership it belongs to; others are dropped.
    pub generation: u64,
    /// The step it belongs to.
    pub step: u64,
    /// Position in a stream of frames.
    pub sequence: u32,
    /// Meaning by kind.
    pub tag: u64,
}

impl BulkHeader {
    /// Bytes before the payload, without the frame's length prefix.
    pub const BYTES: usize = 1 + 8 + 8 + 4 + 8 + 4 + 4;

    /// The header of `payload`.
    pub fn encode(&self, payload: &[u8]) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut out = &mut bytes[..];
        out.put_u8(self.kind as u8);
        out.put_u64_le(self.generation);
        out.put_u64_le(self.step);
        out.put_u32_le(self.sequence);
        out.put_u64_le(self.tag);
        out.put_u32_le(payload.len() as u32);
        out.put_u32_le(crc32fast::hash(payload));
        bytes
    }

    /// Reads a header and checks the payload that follows it.
    ///
    /// # Errors
    /// An unknown kind, a length that is not the payload's, a wrong checksum.
    pub fn decode(frame: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        let Some((header, payload)) = frame.split_first_chunk() else {
            return Err(FrameError::Header(frame.len()));
        };
        let (header, expected) = Self::read(header)?;
        expected.check(payload)?;
        Ok((header, payload))
    }

    /// Reads a header alone, for somebody who wants to choose where the payload goes before it comes.
    ///
    /// # Errors
    /// An unknown kind.
    pub fn read(header: &[u8; Self::BYTES]) -> Result<(Self, Expected), FrameError> {
        let kind = match header[0] {
            1 => BulkKind::Batch,
            2 => BulkKind::State,
            3 => BulkKind::Reduce,
            4 => BulkKind::Gather,
            other => return Err(FrameError::UnknownKind(other)),
        };
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let header = Self { kind, generation: long(1), step: long(9), sequence: word(17), tag: long(21) };
        Ok((header, Expected { length: word(29), checksum: word(33) }))
    }
}

/// What a header says of the payload behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    length: u32,
    checksum: u32,
}

impl Expected {
    /// Compares a payload with its header.
    ///
    /// # Errors
    /// Another length or another CRC-32.
    pub fn check(self, payload: &[u8]) -> Result<(), FrameError> {
        if self.length as usize != payload.len() {
            return Err(FrameError::Header(payload.len()));
        }
        let (expected, actual) = (self.checksum, crc32fast::hash(payload));
        if expected == actual { Ok(()) } else { Err(FrameError::Checksum { expected, actual }) }
    }
}

/// What one frame holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame<M> {
    /// A control message.
    Message(M),
    /// Bulk data.
    Bulk(BulkHeader, Bytes),
}

/// The codec of the length prefix, with the limit set.
pub fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(FRAME_LIMIT_BYTES).new_codec()
}

/// The length of a frame, as [`codec`] writes it before the contents: for whoever writes these without a copy.
pub fn length_prefix(frame: &Bytes) -> [u8; 4] {
    assert!(frame.len() <= FRAME_LIMIT_BYTES, "a frame of {} bytes", frame.len());
    (frame.len() as u32).to_be_bytes()
}

fn config() -> Configuration<LittleEndian, Fixint, Limit<FRAME_LIMIT_BYTES>> {
    bincode::config::legacy().with_limit()
}

/// A control message as the contents of a frame.
pub fn encode_message<M: Encode>(message: &M) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(KIND_MESSAGE);
    let mut writer = out.writer();
    bincode::encode_into_std_write(message, &mut writer, config())
        .expect("a control message is far smaller than the frame limit");
    writer.into_inner().freeze()
}

/// Bulk data as the contents of a frame.
pub fn encode_bulk(header: &BulkHeader, payload: &[u8]) -> Bytes {
    [&header.encode(payload)[..], payload].concat().into()
}

/// Reads the contents of a frame.
///
/// # Errors
/// Anything that is not exactly one message or one undamaged bulk frame.
pub fn decode<M: Decode<()>>(frame: Bytes) -> Result<Frame<M>, FrameError> {
    match frame.first() {
        Some(&KIND_MESSAGE) => {
            let (message, used) = bincode::decode_from_slice(&frame[1..], config())
                .map_err(|error| FrameError::Message(error.to_string()))?;
            if used + 1 != frame.len() {
                return Err(FrameError::Message(format!("{} bytes left over", frame.len() - used - 1)));
            }
            Ok(Frame::Message(message))
        }
        Some(_) => {
            let (header, _) = BulkHeader::decode(&frame)?;
            Ok(Frame::Bulk(header, frame.slice(BulkHeader::BYTES..)))
        }
        None => Err(FrameError::Header(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{HeldState, Stop, ToCoordinator, ToWorker};
    use proptest::prelude::*;

    const HEADER: BulkHeader =
        BulkHeader { kind: BulkKind::State, generation: 3, step: 5, sequence: 7, tag: 9 };

    #[test]
    fn messages_have_these_bytes() {
        let state = Some(HeldState { step: 300, owes_evaluation: false });
        let message = ToCoordinator::Stopped { generation: 2, state, why: Stop::Drained };
        let bytes = encode_message(&message);
        let golden =
            [&[0, 7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1][..], &[44, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]];
        assert_eq!(bytes, golden.concat());
        assert_eq!(decode::<ToCoordinator>(bytes), Ok(Frame::Message(message)));
    }

    #[test]
    fn bulk_frames_have_these_bytes() {
        let bytes = encode_bulk(&HEADER, &[1, 2, 3]);
        let golden = [
            &[2, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0][..],
            &[9, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0x1d, 0x80, 0xbc, 0x55, 1, 2, 3],
        ];
        assert_eq!(bytes, golden.concat());
        assert_eq!(decode::<ToWorker>(bytes), Ok(Frame::Bulk(HEADER, Bytes::from_static(&[1, 2, 3]))));
    }

    #[test]
    fn the_length_prefix_is_that_of_the_codec() {
        for length in [0, 1, 300, 70_000] {
            let frame = Bytes::from(vec![7; length]);
            let mut encoded = BytesMut::new();
            tokio_util::codec::Encoder::encode(&mut codec(), frame.clone(), &mut encoded).unwrap();
            assert_eq!(encoded, [&length_prefix(&frame)[..], &frame].concat());
        }
    }

    #[test]
    fn left_over_bytes_and_damage_are_refused() {
        let mut message = encode_message(&ToWorker::Drain).to_vec();
        message.push(0);
        let error = decode::<ToWorker>(message.into()).unwrap_err();
        assert_eq!(error.to_string(), "a frame that is not a message: 1 bytes left over");

        let mut bulk = encode_bulk(&HEADER, &[1, 2, 3]).to_vec();
        *bulk.last_mut().unwrap() ^= 1;
        assert!(matches!(decode::<ToWorker>(bulk.into()), Err(FrameError::Checksum { .. })));
        assert_eq!(decode::<ToWorker>(Bytes::from_static(&[77; 60])), Err(FrameError::UnknownKind(77)));
        assert_eq!(decode::<ToWorker>(Bytes::new()), Err(FrameError::Header(0)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ToWorker>(bytes.clone().into());
            let _ = decode::<ToCoordinator>(bytes.into());
        }
    }
}
