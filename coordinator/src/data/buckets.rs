//! Training rows of different lengths, dealt so that those of like length share a batch.
//!
//! The rows, shuffled once, are sorted by length and cut into pools of consecutive ones; each pool is dealt to the
//! shards by a [`Deal`] of its own. The steps of an epoch are those of all pools in a random order, so that long and
//! short rows alternate. Nothing depends on anything but seed, lengths, epoch and position.

use std::sync::Arc;

use protocol::job::JobSpec;
use protocol::random::{Purpose, Stream, mix64};
use protocol::slots::Deal;

/// Batches of a pool. More mix better, fewer are more alike in length.
const POOL_BATCHES: usize = 16;

/// Which rows fill the slots of a step.
#[derive(Debug, Clone)]
pub(super) struct Buckets {
    seed: u64,
    /// Rows of a pool; the last pool has what is left besides.
    pool_rows: usize,
    /// The rows in the order of their pools.
    rows: Arc<[u32]>,
    pools: Vec<Deal>,
    /// The epoch whose order `order` holds, and that order: the steps of all pools, counted pool after pool.
    epoch: Option<u64>,
    order: Vec<u32>,
}

impl Buckets {
    /// Deals these rows, at least a batch of them, whose lengths are as told.
    pub(super) fn new(job: &JobSpec, mut rows: Vec<u32>, length: impl Fn(u32) -> usize) -> Self {
        assert!(rows.len() >= job.batch_size as usize, "{} rows are less than a batch", rows.len());
        // Of rows of one length neighbours are often of one kind: what shares a pool is left to chance.
        Stream::new(job.seed, Purpose::Deal, [0, 0]).shuffle(&mut rows);
        rows.sort_by_key(|&row| length(row));
        let pool_rows = POOL_BATCHES * job.batch_size as usize;
        let whole = (rows.len() / pool_rows).max(1);
        let pools = (0..whole).map(|pool| {
            let samples = if pool + 1 < whole { pool_rows } else { rows.len() - pool * pool_rows };
            let seed = mix64(job.seed ^ mix64(pool as u64));
            Deal::new(seed, samples as u32, job.batch_size, job.shards)
        });
        let pools = pools.collect();
        Self { seed: job.seed, pool_rows, rows: rows.into(), pools, epoch: None, order: Vec::new() }
    }

    /// Steps of an epoch: ⌊N/B⌋, since all pools but the last fill their batches.
    pub(super) fn steps_per_epoch(&self) -> u64 {
        self.pools.iter().map(Deal::steps_per_epoch).sum()
    }

    /// The rows of `shard` in step `index` of `epoch`, one for each slot.
    pub(super) fn rows(&mut self, epoch: u64, index: u64, shard: u32) -> impl Iterator<Item = u32> + '_ {
        if self.epoch != Some(epoch) {
            self.order = (0..self.steps_per_epoch() as u32).collect();
            Stream::new(self.seed, Purpose::Pools, [epoch as u32, 0]).shuffle(&mut self.order);
            self.epoch = Some(epoch);
        }
        let step = self.order[index as usize] as usize;
        let pool = (step / POOL_BATCHES).min(self.pools.len() - 1);
        let of_pool = &self.rows[pool * self.pool_rows..];
        let index_in_pool = (step - pool * POOL_BATCHES) as u64;
        self.pools[pool].samples(epoch, index_in_pool, shard).iter().map(|&sample| of_pool[sample as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::job;
    use super::*;
    use proptest::prelude::*;
    use protocol::slots::slots;

    /// Rows whose lengths are as unlike as those of the lines of a text.
    fn length(row: u32) -> usize {
        1 + (mix64(u64::from(row)) % 97) as usize
    }

    fn buckets(rows: u32, batch_size: u32, shards: u32) -> Buckets {
        let job = job("char-lstm", &[("batch_size", batch_size), ("shards", shards)]);
        Buckets::new(&job, (0..rows).collect(), length)
    }

    fn batches(buckets: &mut Buckets, epoch: u64, shards: u32) -> Vec<Vec<u32>> {
        (0..buckets.steps_per_epoch())
            .map(|index| {
                (0..shards).flat_map(|shard| buckets.rows(epoch, index, shard).collect::<Vec<_>>()).collect()
            })
            .collect()
    }

    proptest! {
        #[test]
        fn an_epoch_uses_no_row_twice_and_skips_fewer_than_a_batch(
            rows in 1u32..2000, batch_size in 1u32..40, shards in 1u32..9, epoch in 0u64..3,
        ) {
            prop_assume!(shards <= batch_size && batch_size <= rows);
            let mut buckets = buckets(rows, batch_size, shards);
            let mut used = Vec::new();
            for index in 0..buckets.steps_per_epoch() {
                for shard in 0..shards {
                    let taken: Vec<u32> = buckets.rows(epoch, index, shard).collect();
                    prop_assert_eq!(taken.len(), slots(batch_size, shards, shard).len());
                    used.extend(taken);
                }
            }
            let count = used.len() as u32;
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(used.len() as u32, count);
            prop_assert!(used.last().is_none_or(|&row| row < rows));
            prop_assert_eq!(count, rows - rows % batch_size);
        }
    }

    #[test]
    fn rows_of_like_length_share_a_batch() {
        let mut buckets = buckets(20_000, 32, 8);
        assert_eq!(buckets.pools.len(), 39);
        let (mut padding, mut steps) = (0, 0);
        for batch in batches(&mut buckets, 0, 8) {
            let longest = batch.iter().map(|&row| length(row)).max().unwrap();
            padding += batch.iter().map(|&row| longest - length(row)).sum::<usize>();
            steps += batch.len() * longest;
        }
        let share = padding as f64 / steps as f64;
        println!("filled up, the batches would be {:.2} % padding", 100.0 * share);
        assert!(share < 0.03, "{share}");
    }

    #[test]
    fn epochs_differ_in_their_order_and_in_their_batches() {
        let mut buckets = buckets(3000, 10, 3);
        let (first, second) = (batches(&mut buckets, 0, 3), batches(&mut buckets, 1, 3));
        let lengths = |batches: &[Vec<u32>]| -> Vec<usize> {
            batches.iter().map(|batch| length(batch[0]) / 10).collect()
        };
        assert_ne!(lengths(&first), lengths(&second), "pools come in another order");
        assert!(!lengths(&first).is_sorted());
        let sorted = |mut batch: Vec<u32>| {
            batch.sort_unstable();
            batch
        };
        let known: Vec<Vec<u32>> = first.iter().cloned().map(sorted).collect();
        assert!(second.iter().cloned().map(sorted).all(|batch| !known.contains(&batch)));
        assert_eq!(batches(&mut buckets, 0, 3), first, "an epoch asked for again is the same");
    }

    #[test]
    fn another_seed_gives_other_batches() {
        let of_seed = |seed| {
            let job = job("char-lstm", &[("batch_size", 4), ("shards", 1), ("seed", seed)]);
            batches(&mut Buckets::new(&job, (0..40).collect(), |_| 5), 0, 1)
        };
        assert_ne!(of_seed(1), of_seed(2));
    }

    #[test]
    fn rows_of_one_length_are_mixed_beyond_their_neighbours() {
        let job = job("char-lstm", &[("batch_size", 4), ("shards", 1)]);
        let mut buckets = Buckets::new(&job, (0..640).collect(), |_| 5);
        // Neighbours would lie within the 64 rows of a pool.
        let spread = |batch: &Vec<u32>| batch.iter().max().unwrap() - batch.iter().min().unwrap();
        let wide = batches(&mut buckets, 0, 1).iter().filter(|batch| spread(batch) > 64).count();
        assert!(wide > 150, "{wide} of 160");
    }
}
