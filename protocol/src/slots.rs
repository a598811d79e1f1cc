//! Slots and shards: which rows of the global batch belong to which shard, and which shards to which worker.

use std::ops::Range;

use crate::random::{Purpose, Stream};

/// The slots of a shard: ⌊sB/S⌋ .. ⌊(s+1)B/S⌋. Every shard has at least one when `shards <= batch_size`.
pub fn slots(batch_size: u32, shards: u32, shard: u32) -> Range<u32> {
    split(batch_size, shards, shard)
}

/// The slots of consecutive shards: they are consecutive too.
pub fn slots_of(batch_size: u32, shards: u32, range: Range<u32>) -> Range<u32> {
    let bound = |shard| (u64::from(batch_size) * u64::from(shard) / u64::from(shards)) as u32;
    bound(range.start)..bound(range.end)
}

/// The shards of a rank where all have as many, within one: contiguous.
pub fn shards_of_rank(shards: u32, world_size: u32, rank: u32) -> Range<u32> {
    split(shards, world_size, rank)
}

/// Part `index` of `0 .. total` cut into `parts` contiguous parts.
fn split(total: u32, parts: u32, index: u32) -> Range<u32> {
    assert!(index < parts, "split: part {index} of {parts}");
    let bound = |i: u32| (u64::from(total) * u64::from(i) / u64::from(parts)) as u32;
    bound(index)..bound(index + 1)
}

/// Which samples of a data set of `samples` independent samples fill the slots of a step.
///
/// Samples are dealt to shards once, by a seeded permutation, in proportion to their slots; each epoch permutes
/// inside the shard. An epoch has ⌊N/B⌋ steps; what it leaves out differs from epoch to epoch.
#[derive(Debug, Clone)]
pub struct Deal {
    seed: u64,
    batch_size: u32,
    shards: u32,
    /// All samples in dealt order: shard `s` owns ⌊N·a/B⌋ .. ⌊N·b/B⌋ where `a..b` are its slots.
    dealt: Vec<u32>,
    /// The epoch whose order `order` holds, and that order: `dealt` permuted inside each shard.
    epoch: Option<u64>,
    order: Vec<u32>,
}

impl Deal {
    /// Deals `samples` samples to `shards` shards.
    pub fn new(seed: u64, samples: u32, batch_size: u32, shards: u32) -> Self {
        let mut dealt: Vec<u32> = (0..samples).collect();
        Stream::new(seed, Purpose::Deal, [0, 0]).shuffle(&mut dealt);
        Self { seed, batch_size, shards, dealt, epoch: None, order: Vec::new() }
    }

    /// Steps of an epoch: ⌊N/B⌋.
    pub fn steps_per_epoch(&self) -> u64 {
        self.dealt.len() as u64 / u64::from(self.batch_size)
    }

    /// The samples of `shard` in step `index` of `epoch`, one per slot.
    pub fn samples(&mut self, epoch: u64, index: u64, shard: u32) -> &[u32] {
        if self.epoch != Some(epoch) {
            self.order.clone_from(&self.dealt);
            for shard in 0..self.shards {
                let owned = self.owned(shard);
                Stream::new(self.seed, Purpose::Shuffle, [epoch as u32, shard])
                    .shuffle(&mut self.order[owned]);
            }
            self.epoch = Some(epoch);
        }
        let width = slots(self.batch_size, self.shards, shard).len();
        let start = self.owned(shard).start + index as usize * width;
        &self.order[start..start + width]
    }

    fn owned(&self, shard: u32) -> Range<usize> {
        let slots = slots(self.batch_size, self.shards, shard);
        let bound = |slot: u32| self.dealt.len() * slot as usize / self.batch_size as usize;
        bound(slots.start)..bound(slots.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn uneven_batches_differ_by_one_slot() {
        let widths: Vec<usize> = (0..7).map(|s| slots(64, 7, s).len()).collect();
        assert_eq!(widths, [9, 9, 9, 9, 9, 9, 10]);
        assert_eq!(slots_of(64, 7, 2..5), 18..45);
        assert_eq!(shards_of_rank(8, 3, 1), 2..5);
    }

    proptest! {
        #[test]
        fn an_epoch_uses_no_sample_twice_and_skips_fewer_than_a_batch(
            samples in 1u32..400, batch_size in 1u32..60, shards in 1u32..20, seed in 0u64..5,
        ) {
            prop_assume!(shards <= batch_size && batch_size <= samples);
            let mut deal = Deal::new(seed, samples, batch_size, shards);
            let mut used = Vec::new();
            for index in 0..deal.steps_per_epoch() {
                for shard in 0..shards {
                    let taken = deal.samples(3, index, shard);
                    prop_assert_eq!(taken.len(), slots(batch_size, shards, shard).len());
                    used.extend_from_slice(taken);
                }
            }
            let count = used.len();
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(used.len(), count);
            prop_assert!(samples as usize - count < batch_size as usize);
        }
    }

    #[test]
    fn what_an_epoch_skips_differs_from_epoch_to_epoch() {
        let mut deal = Deal::new(1, 1003, 50, 7);
        let mut used = |epoch| {
            let mut all: Vec<u32> = (0..20)
                .flat_map(|i| (0..7).map(move |s| (i, s)))
                .flat_map(|(i, s)| deal.samples(epoch, i, s).to_vec())
                .collect();
            all.sort_unstable();
            all
        };
        assert_ne!(used(0), used(1));
    }
}
