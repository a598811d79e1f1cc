//! State images on their way: from the coordinator to a worker, and back.

use bytes::Bytes;
use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind, encode_bulk};
use protocol::message::WorkerId;
use protocol::problem::Problem;

use crate::server::Link;

/// Streams a state to a worker.
pub(crate) fn send_image(link: &Link, generation: u64, step: u64, image: &[u8]) {
    for (chunk, sequence) in image.chunks(BULK_CHUNK_BYTES).zip(0u32..) {
        let tag = u64::from(sequence) * BULK_CHUNK_BYTES as u64;
        let header = BulkHeader { kind: BulkKind::State, generation, step, sequence, tag };
        link.send_frame(encode_bulk(&header, chunk));
    }
}

/// The state that a worker streams.
#[derive(Debug, Default)]
pub(crate) struct Arriving {
    from: Option<(WorkerId, u64)>,
    image: Vec<u8>,
}

impl Arriving {
    /// Whether a part has arrived and the rest has not.
    pub(crate) fn is_under_way(&self) -> bool {
        self.from.is_some()
    }

    /// Drops what has arrived from this worker.
    pub(crate) fn forget(&mut self, id: WorkerId) {
        if self.from.is_some_and(|(from, _)| from == id) {
            *self = Self::default();
        }
    }

    /// Takes in a part; gives the image of `size` bytes when it is whole.
    ///
    /// # Errors
    /// The part is not the next one.
    pub(crate) fn take(
        &mut self,
        id: WorkerId,
        header: &BulkHeader,
        part: &Bytes,
        size: usize,
    ) -> Result<Option<Vec<u8>>, Problem> {
        let from = *self.from.get_or_insert((id, header.step));
        let fits = header.kind == BulkKind::State
            && from == (id, header.step)
            && header.tag == self.image.len() as u64
            && self.image.len() + part.len() <= size;
        if !fits {
            return Err(Problem::failed("parts of a state arrived in the wrong order"));
        }
        self.image.extend_from_slice(part);
        if self.image.len() < size {
            return Ok(None);
        }
        self.from = None;
        Ok(Some(std::mem::take(&mut self.image)))
    }
}
