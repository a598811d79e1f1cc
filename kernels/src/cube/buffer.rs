//! Memory of a device: flat words of 32 bits, floats mostly.

use cubecl::prelude::*;
use cubecl::server::Handle;
use std::ops::Range;

/// Words at which a [`Buffer::part`] may begin: the strictest alignment that a runtime asks of a binding.
pub const ALIGNMENT: usize = 64;

/// What the device could not do. Launches are asynchronous: an error may belong to an earlier call.
#[derive(Debug, Clone)]
pub struct DeviceFailure(pub String);

/// Result of a call that waits for the device.
pub type Result<T> = std::result::Result<T, DeviceFailure>;

/// Some words of a device's memory. A clone is the same memory; it is freed with the last.
#[derive(Debug, Clone)]
pub struct Buffer {
    handle: Handle,
    len: usize,
}

impl Buffer {
    /// Room for `len` words, whatever they are.
    pub fn new<R: Runtime>(client: &ComputeClient<R>, len: usize) -> Self {
        // A kernel reads its first word in place of one past its end: there is always a first.
        Self { handle: client.empty(size_of::<u32>() * len.max(1)), len }
    }

    /// Floats of the host.
    pub fn from_floats<R: Runtime>(client: &ComputeClient<R>, values: &[f32]) -> Self {
        match values.is_empty() {
            true => Self::new(client, 0),
            false => Self { handle: client.create_from_slice(f32::as_bytes(values)), len: values.len() },
        }
    }

    /// Words of the host.
    pub fn from_words<R: Runtime>(client: &ComputeClient<R>, words: &[u32]) -> Self {
        match words.is_empty() {
            true => Self::new(client, 0),
            false => Self { handle: client.create_from_slice(u32::as_bytes(words)), len: words.len() },
        }
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A range of the words as a buffer.
    ///
    /// # Panics
    /// It reaches beyond the end or begins between multiples of [`ALIGNMENT`].
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start.is_multiple_of(ALIGNMENT) && range.end <= self.len,
            "part {range:?} of a buffer of {} words, expected a start that is a multiple of {ALIGNMENT}",
            self.len
        );
        let bytes = |words: usize| (size_of::<u32>() * words) as u64;
        let handle = self.handle.clone().offset_start(bytes(range.start));
        Self { handle: handle.offset_end(bytes(self.len - range.end)), len: range.len() }
    }

    /// Reads a range of floats back, waiting for all that was enqueued before.
    ///
    /// # Errors
    /// The device failed, now or in a kernel before.
    pub fn read_floats<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        range: Range<usize>,
    ) -> Result<Vec<f32>> {
        Ok(f32::from_bytes(&self.read(client, range)?).to_vec())
    }

    /// As [`read_floats`](Self::read_floats), for whole numbers.
    ///
    /// # Errors
    /// As there.
    pub fn read_words<R: Runtime>(&self, client: &ComputeClient<R>, range: Range<usize>) -> Result<Vec<u32>> {
        Ok(u32::from_bytes(&self.read(client, range)?).to_vec())
    }

    fn read<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        range: Range<usize>,
    ) -> Result<cubecl::bytes::Bytes> {
        assert!(range.end <= self.len, "read: {range:?} of a buffer of {} words", self.len);
        if range.is_empty() {
            return Ok(cubecl::bytes::Bytes::from_bytes_vec(Vec::new()));
        }
        let bytes = |words: usize| (size_of::<u32>() * words) as u64;
        let handle =
            self.handle.clone().offset_start(bytes(range.start)).offset_end(bytes(self.len - range.end));
        client.read_one(handle).map_err(|error| DeviceFailure(format!("{error:?}")))
    }

    /// The device's own handle of the memory, for whoever must know where it is.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The whole buffer as an argument of a kernel.
    pub(crate) fn arg<R: Runtime>(&self) -> ArrayArg<R> {
        // SAFETY: the handle has room for `len` words (one if it is 0) from its own start on: `new` and `part`.
        unsafe { ArrayArg::from_raw_parts(self.handle.clone(), self.len.max(1)) }
    }
}

/// Waits until everything that was enqueued is done.
///
/// # Errors
/// A kernel could not be launched.
pub fn synchronize<R: Runtime>(client: &ComputeClient<R>) -> Result<()> {
    cubecl::future::block_on(client.sync()).map_err(|error| DeviceFailure(format!("{error:?}")))
}

/// Units of a cube of the kernels whose units do not talk to each other.
pub(crate) const UNITS: u32 = 256;

/// Cubes of [`UNITS`] units for `count` units in all.
pub(crate) fn cubes(count: usize) -> CubeCount {
    let cubes = count.div_ceil(UNITS as usize).max(1) as u32;
    let wide = cubes.min(65_535);
    CubeCount::Static(wide, cubes.div_ceil(wide), 1)
}
