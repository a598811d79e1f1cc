//! Exchange of the shards' sums, and of the wish to stop, between the workers of a generation.

use model::device::Device;
use protocol::sums::StepSums;

use crate::collective::{Collective, Result};

/// The sums of this worker's shards for one batch, as bytes.
pub(crate) struct ShardSums(Vec<u8>);

const BYTES: usize = 8 * 6;

impl ShardSums {
    /// Six little-endian words a shard.
    pub(crate) fn new(by_shard: &[StepSums]) -> Self {
        let words = |sums: &StepSums| {
            let flag = u64::from(sums.non_finite);
            [sums.loss.to_bits(), sums.weight, sums.correct, sums.rows, sums.row_hash, flag]
        };
        Self(by_shard.iter().flat_map(words).flat_map(u64::to_le_bytes).collect())
    }
}

fn decode(bytes: &[u8]) -> impl Iterator<Item = StepSums> {
    bytes.chunks_exact(BYTES).map(|shard| {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| shard[8 * i + b]));
        StepSums {
            loss: f64::from_bits(word(0)),
            weight: word(1),
            correct: word(2),
            rows: word(3),
            row_hash: word(4),
            non_finite: word(5) != 0,
        }
    })
}

/// Gives every worker the sums of all shards of each batch, by batch and shard, and whether any worker wants to
/// stop. All workers hold contiguous shards in rank order, so ranks' sums follow one another.
pub(crate) fn exchange_sums<D: Device>(
    collective: &mut dyn Collective<D>,
    own: &[ShardSums],
    stop: bool,
) -> Result<(Vec<Vec<StepSums>>, bool)> {
    let mut message = vec![u8::from(stop)];
    message.extend(own.iter().flat_map(|batch| &batch.0));
    let received = collective.exchange(&message)?;
    let mut by_batch = vec![Vec::new(); own.len()];
    for bytes in &received {
        let per_batch = (bytes.len() - 1) / own.len().max(1);
        for (batch, part) in by_batch.iter_mut().zip(bytes[1..].chunks_exact(per_batch.max(1))) {
            batch.extend(decode(part));
        }
    }
    Ok((by_batch, received.iter().any(|bytes| bytes[0] != 0)))
}
