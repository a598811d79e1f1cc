//! The (step, row) pairs of a batch's shards, in the order of every sum over them.

use std::ops::Range;

use protocol::batch::Batch;
use protocol::tree::TreeNode;

use super::block::RowBlock;

/// All pairs of a batch: shard by shard, in a shard step by step, in a step row by row.
#[derive(Default)]
pub(super) struct ShardPairs {
    pairs: Vec<Pair>,
    /// Where each shard's pairs are, and how many rows it has.
    shards: Vec<(Range<usize>, usize)>,
    /// The batch's first shard.
    first_shard: u32,
}

/// The step of a row, which lies at a place of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pair {
    /// Position of the block among all.
    pub(super) block: u32,
    /// Counted from the block's first.
    pub(super) row: u32,
    /// In the forward direction.
    pub(super) place: u32,
}

impl ShardPairs {
    /// Takes over the pairs of a batch whose rows lie in these blocks. A shard's rows may lie in several.
    pub(super) fn take(&mut self, batch: &Batch, blocks: &[RowBlock]) {
        self.first_shard = batch.shards.first().map_or(0, |shard| shard.shard);
        self.pairs.clear();
        self.shards.clear();
        for shard in &batch.shards {
            let start = self.pairs.len();
            let first = blocks.partition_point(|block| block.rows.end <= shard.rows.start);
            let own = || {
                let all = blocks.iter().enumerate().skip(first);
                all.take_while(|(_, block)| block.rows.start < shard.rows.end)
            };
            let steps = own().map(|(_, block)| block.runs.seq_len()).max().unwrap_or(0);
            for t in 0..steps {
                for (index, block) in own() {
                    for row in rows_within(block, &shard.rows) {
                        if let Some(place) = block.runs.place(t, row) {
                            let [block, row, place] = [index, row, place].map(|at| at as u32);
                            self.pairs.push(Pair { block, row, place });
                        }
                    }
                }
            }
            self.shards.push((start..self.pairs.len(), shard.rows.len()));
        }
    }

    /// The pairs of a shard.
    pub(super) fn of_shard(&self, shard: u32) -> &[Pair] {
        &self.pairs[self.shards[self.position(shard)].0.clone()]
    }

    /// The first step of each row of a shard.
    pub(super) fn first_steps(&self, shard: u32) -> &[Pair] {
        let (pairs, rows) = &self.shards[self.position(shard)];
        // Every row has a first step, and the first steps come first.
        &self.pairs[pairs.clone()][..*rows]
    }

    /// Whether all shards below a node are the batch's.
    pub(super) fn holds(&self, node: TreeNode, shards: u32) -> bool {
        let (below, end) = (node.range(shards), self.first_shard + self.shards.len() as u32);
        self.first_shard <= below.start && below.end <= end
    }

    fn position(&self, shard: u32) -> usize {
        (shard - self.first_shard) as usize
    }
}

/// The rows of a block that are among these of the batch, counted from the block's first.
fn rows_within(block: &RowBlock, rows: &Range<usize>) -> Range<usize> {
    let start = rows.start.max(block.rows.start);
    let end = rows.end.min(block.rows.end).max(start);
    start - block.rows.start..end - block.rows.start
}
