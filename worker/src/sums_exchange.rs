//! Exchange of the shards' sums, and of what the workers wish to do next, between the workers of a generation.

use model::device::Device;
use protocol::message::Member;
use protocol::sums::StepSums;

use crate::collective::{Collective, CollectiveError, Result};

/// Bytes of one shard's sums: six little-endian words.
const SUMS_BYTES: usize = 8 * 6;

/// What is to happen after a step. If workers wish different things, the greatest wish is done by all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// The next step.
    GoOn,
    /// Another generation.
    Pause,
    /// The end.
    Drain,
}

/// Gives every worker the sums of all shards, `[batch][shard]`, and what all do next. `own` holds this worker's shards,
/// `[batch][own shard]`. Members hold contiguous shards in rank order, so their sums follow one another.
///
/// # Errors
/// Another worker was lost, or sent something else.
pub fn exchange_sums<D: Device>(
    collective: &mut dyn Collective<D>,
    members: &[Member],
    own: &[Vec<StepSums>],
    wish: Wish,
) -> Result<(Vec<Vec<StepSums>>, Wish)> {
    let mut message = vec![wish as u8];
    message.extend(own.iter().flatten().flat_map(encode));
    let received = collective.exchange(&message)?;
    let mut by_batch = vec![Vec::new(); own.len()];
    let mut common = Wish::GoOn;
    for ((bytes, member), rank) in received.iter().zip(members).zip(0..) {
        let batch_bytes = SUMS_BYTES * member.shards.len();
        let Some((flag, sums)) =
            bytes.split_first().filter(|(_, sums)| sums.len() == own.len() * batch_bytes)
        else {
            let cause = format!("it sent {} bytes of sums for {} batches", bytes.len(), own.len());
            return Err(CollectiveError::PeerLost { rank, name: member.name.clone(), cause });
        };
        common = common.max(match flag {
            0 => Wish::GoOn,
            1 => Wish::Pause,
            _ => Wish::Drain,
        });
        for (batch, sums) in by_batch.iter_mut().zip(sums.chunks_exact(batch_bytes)) {
            batch.extend(sums.chunks_exact(SUMS_BYTES).map(decode));
        }
    }
    Ok((by_batch, common))
}

fn encode(sums: &StepSums) -> impl Iterator<Item = u8> + use<> {
    let flag = u64::from(sums.non_finite);
    let words = [sums.loss.to_bits(), sums.weight, sums.correct, sums.rows, sums.row_hash, flag];
    words.into_iter().flat_map(u64::to_le_bytes)
}

fn decode(bytes: &[u8]) -> StepSums {
    let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| bytes[8 * i + b]));
    StepSums {
        loss: f64::from_bits(word(0)),
        weight: word(1),
        correct: word(2),
        rows: word(3),
        row_hash: word(4),
        non_finite: word(5) != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_back_from_their_bytes() {
        let sums =
            StepSums { loss: -0.5, weight: 1, correct: 2, rows: 3, row_hash: u64::MAX, non_finite: true };
        let bytes: Vec<u8> = encode(&sums).collect();
        assert_eq!(bytes.len(), SUMS_BYTES);
        assert_eq!(decode(&bytes), sums);
    }
}
