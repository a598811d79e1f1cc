//! The pure part of an all-reduce: how a bucket is cut, whose pieces a sum needs, and the additions in tree order.
//!
//! A bucket is cut into one [`slice()`] per rank and each slice into [`blocks`], the unit that travels and is summed.
//! The owner of a slice collects, for each of its blocks, one piece per node of the ranks' covers; when all are
//! there it executes the additions that [`tree::remaining`] lists. Which pieces came first, and how many ranks
//! there are, changes nothing: the operands of every addition are fixed by the tree.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use protocol::tree::{self, Addition, TreeNode};

/// Slices begin at multiples of this many floats: one cache line, one AVX-512 register.
pub const ALIGN_FLOATS: usize = 16;

/// Floats of a block. 256 KiB: the pieces of a sum stay in the second-level cache, and the first finished block
/// can travel while the last one still arrives. A whole block is one frame, below `frame::BULK_CHUNK_BYTES`.
pub const BLOCK_FLOATS: usize = 64 << 10;

/// The part of a bucket of `len` floats that `rank` sums: contiguous, in rank order, empty if the bucket is small.
pub fn slice(len: usize, world_size: u32, rank: u32) -> Range<usize> {
    assert!(rank < world_size, "slice: rank {rank} of {world_size}");
    let units = len.div_ceil(ALIGN_FLOATS);
    let bound = |r: u32| (units * r as usize / world_size as usize * ALIGN_FLOATS).min(len);
    bound(rank)..bound(rank + 1)
}

/// The blocks of a range, in order: all of [`BLOCK_FLOATS`] but the last.
pub fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(BLOCK_FLOATS).map(move |start| start..(start + BLOCK_FLOATS).min(end))
}

/// One block of a range, if it has so many.
pub fn block_range(range: Range<usize>, block: u32) -> Option<Range<usize>> {
    let start = range.start + block as usize * BLOCK_FLOATS;
    (start < range.end).then(|| start..(start + BLOCK_FLOATS).min(range.end))
}

/// Number of blocks of a range of `len` floats.
pub fn block_count(len: usize) -> u32 {
    u32::try_from(len.div_ceil(BLOCK_FLOATS)).expect("a buffer has fewer than 2^32 blocks")
}

/// Which nodes a sum needs and in which order they are added; fixed for a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// All nodes of all covers from left to right, each with the rank that sends it.
    nodes: Vec<(u32, TreeNode)>,
    /// Leftmost leaf of each node: its name on the wire.
    leaves: Vec<u32>,
    /// Additions between positions in `nodes`; the last one leaves the sum at position 0.
    additions: Vec<(usize, usize)>,
}

impl Plan {
    /// The plan for ranks that hold these shards. `ranges` must be non-empty and adjoin, from shard 0 on: the
    /// coordinator assigns them so.
    pub fn new(ranges: &[Range<u32>]) -> Self {
        let mut end = 0;
        for (rank, range) in ranges.iter().enumerate() {
            assert!(
                range.start == end && range.end > end,
                "rank {rank} holds shards {range:?}, expected at least one from shard {end} on"
            );
            end = range.end;
        }
        let covers = |(rank, range): (usize, &Range<u32>)| {
            tree::cover(end, range.clone()).into_iter().map(move |node| (rank as u32, node))
        };
        let nodes: Vec<(u32, TreeNode)> = ranges.iter().enumerate().flat_map(covers).collect();
        let leaves: Vec<u32> = nodes.iter().map(|(_, node)| node.range(end).start).collect();
        let only_nodes: Vec<TreeNode> = nodes.iter().map(|(_, node)| *node).collect();
        let position = |leaf| leaves.binary_search(&leaf).expect("remaining additions join covered nodes");
        let additions = tree::remaining(end, &only_nodes)
            .into_iter()
            .map(|Addition { left, right }| (position(left), position(right)))
            .collect();
        Self { nodes, leaves, additions }
    }

    /// The nodes that `rank` sends, from left to right, and the leaf that names each on the wire.
    pub fn nodes_of(&self, rank: u32) -> impl Iterator<Item = (TreeNode, u32)> {
        let of_rank = move |((sender, node), leaf): (&(u32, TreeNode), &u32)| {
            (*sender == rank).then_some((*node, *leaf))
        };
        self.nodes.iter().zip(&self.leaves).filter_map(of_rank)
    }

    /// All nodes of all ranks from left to right, each with the rank that sends it.
    pub fn nodes(&self) -> &[(u32, TreeNode)] {
        &self.nodes
    }

    /// The additions in their order, between positions in [`nodes`](Self::nodes); they leave the sum at position 0.
    pub fn additions(&self) -> &[(usize, usize)] {
        &self.additions
    }

    /// Adds the pieces of one block in tree order. `recycle` gets the buffers that are no longer needed.
    pub fn sum(&self, pieces: Pieces<'_>, mut recycle: impl FnMut(Vec<f32>)) -> Vec<f32> {
        match self.last_operands(pieces, &mut recycle) {
            (sum, Some(addend)) => add(sum, addend, &mut recycle),
            (sum, None) => sum.into_owned(),
        }
    }

    /// As [`sum`](Self::sum), to where the sum is wanted.
    pub fn sum_to(&self, out: &mut [f32], pieces: Pieces<'_>, mut recycle: impl FnMut(Vec<f32>)) {
        let (sum, addend) = self.last_operands(pieces, &mut recycle);
        match &addend {
            Some(addend) => {
                for ((out, sum), addend) in out.iter_mut().zip(&*sum).zip(&**addend) {
                    *out = sum + addend;
                }
            }
            None => out.copy_from_slice(&sum),
        }
        [Some(sum), addend].into_iter().flatten().for_each(|operand| recycle_owned(operand, &mut recycle));
    }

    /// Does all additions but the last, and gives the operands of that; of a sum without additions its only piece.
    fn last_operands<'v>(
        &self,
        pieces: Pieces<'v>,
        recycle: &mut impl FnMut(Vec<f32>),
    ) -> (Values<'v>, Option<Values<'v>>) {
        let mut places = pieces.0;
        let take = |i: usize, places: &mut Places<'v>| places[i].take().expect("a node is added once");
        let Some((&(_, last), before)) = self.additions.split_last() else {
            return (take(0, &mut places), None);
        };
        for &(left, right) in before {
            let (sum, addend) = (take(left, &mut places), take(right, &mut places));
            places[left] = Some(Cow::Owned(add(sum, addend, recycle)));
        }
        (take(0, &mut places), Some(take(last, &mut places)))
    }
}

/// `sum + addend`, in the memory of one of them if it is not borrowed: additions commute, bit for bit.
fn add(sum: Values<'_>, addend: Values<'_>, recycle: &mut impl FnMut(Vec<f32>)) -> Vec<f32> {
    let (mut sum, addend) = match (sum, addend) {
        (Cow::Borrowed(sum), Cow::Owned(addend)) => (addend, Cow::Borrowed(sum)),
        (sum, addend) => (sum.into_owned(), addend),
    };
    for (sum, addend) in sum.iter_mut().zip(&*addend) {
        *sum += addend;
    }
    recycle_owned(addend, recycle);
    sum
}

fn recycle_owned(values: Values<'_>, recycle: &mut impl FnMut(Vec<f32>)) {
    if let Cow::Owned(values) = values {
        recycle(values);
    }
}

/// One node's values of a block: a buffer of its own, or where the device keeps them.
type Values<'v> = Cow<'v, [f32]>;
type Places<'v> = Vec<Option<Values<'v>>>;

/// All pieces of one block, by position in the plan's nodes: what [`Plan::sum`] adds.
#[derive(Debug)]
pub struct Pieces<'v>(Places<'v>);

/// Why a piece cannot belong to a sum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The sender does not hold such a node.
    #[error("it sent the sum of a node at shard {leaf}, which it does not hold")]
    NotItsNode {
        /// The leaf that names the node.
        leaf: u32,
    },
    /// The piece is there already.
    #[error("it sent the sum of the node at shard {leaf} twice")]
    Twice {
        /// The leaf that names the node.
        leaf: u32,
    },
    /// The other pieces of the block have another length.
    #[error("it sent {actual} floats of a block, expected {expected}")]
    Length {
        /// Floats of the piece.
        actual: usize,
        /// Floats of the others.
        expected: usize,
        /// A rank that sent one of the others.
        other: u32,
    },
}

/// The sums that still lack pieces, of all tickets under way.
#[derive(Debug, Default)]
pub struct Sums {
    /// By (ticket, block): the pieces at hand and their number.
    open: BTreeMap<(u32, u32), (usize, Places<'static>)>,
}

impl Sums {
    /// Takes one piece of a block; returns all of them once the last one is there. Pieces may come in any order and
    /// before this worker has begun the ticket itself.
    ///
    /// # Errors
    /// The piece does not fit; the sums are as before.
    pub fn deliver(
        &mut self,
        plan: &Plan,
        (ticket, block): (u32, u32),
        (rank, leaf): (u32, u32),
        values: Vec<f32>,
    ) -> Result<Option<Pieces<'static>>, Refused> {
        let position = plan.leaves.binary_search(&leaf).map_err(|_| Refused::NotItsNode { leaf })?;
        if plan.nodes[position].0 != rank {
            return Err(Refused::NotItsNode { leaf });
        }
        let (held, places) =
            self.open.entry((ticket, block)).or_insert_with(|| (0, vec![None; plan.nodes.len()]));
        if places[position].is_some() {
            return Err(Refused::Twice { leaf });
        }
        let first =
            places.iter().zip(&plan.nodes).find_map(|(place, node)| Some((place.as_ref()?.len(), node.0)));
        if let Some((expected, other)) = first
            && expected != values.len()
        {
            return Err(Refused::Length { actual: values.len(), expected, other });
        }
        places[position] = Some(Cow::Owned(values));
        *held += 1;
        if *held < plan.nodes.len() {
            return Ok(None);
        }
        Ok(self.open.remove(&(ticket, block)).map(|(_, places)| Pieces(places)))
    }

    /// All pieces of a block if the others' are there: those that are missing are `own`, from left to right, `len` floats
    /// each.
    ///
    /// # Errors
    /// Another rank's piece has another length.
    pub fn complete<'v>(
        &mut self,
        plan: &Plan,
        key: (u32, u32),
        own: &[&'v [f32]],
        len: usize,
    ) -> Result<Option<Pieces<'v>>, Refused> {
        let held = self.open.get(&key).map_or(0, |(held, _)| *held);
        if held + own.len() < plan.nodes.len() {
            return Ok(None);
        }
        let mut places: Places<'v> = match self.open.remove(&key) {
            Some((_, places)) => places,
            None => vec![None; plan.nodes.len()],
        };
        let mut own = own.iter();
        for (place, (sender, _)) in places.iter_mut().zip(&plan.nodes) {
            match place {
                Some(values) if values.len() != len => {
                    return Err(Refused::Length { actual: len, expected: values.len(), other: *sender });
                }
                Some(_) => {}
                None => *place = own.next().map(|values| Cow::Borrowed(*values)),
            }
        }
        Ok(Some(Pieces(places)))
    }

    /// The ranks from which pieces of a ticket are missing; a rank may be named more than once.
    pub fn missing<'a>(&'a self, plan: &'a Plan, ticket: u32) -> impl Iterator<Item = u32> + 'a {
        let open = self.open.range((ticket, 0)..=(ticket, u32::MAX));
        open.flat_map(|(_, (_, places))| {
            places.iter().zip(&plan.nodes).filter(|(place, _)| place.is_none()).map(|(_, (rank, _))| *rank)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::random::mix64;

    /// Floats from 1e-18 to 1e18, so that any other order of additions shows.
    fn wild(seed: u64) -> f32 {
        let bits = mix64(seed);
        let exponent = 67 + (bits % 120) as u32;
        f32::from_bits((bits >> 32) as u32 & 0x807f_ffff | exponent << 23)
    }

    fn single_process(shards: u32, partials: &mut [Vec<f32>]) -> Vec<u32> {
        for Addition { left, right } in tree::tree(shards) {
            for i in 0..partials[0].len() {
                partials[left as usize][i] += partials[right as usize][i];
            }
        }
        partials[0].iter().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn any_ranges_and_any_arrival_give_the_bits_of_one_process(
            shards in 1u32..40,
            cuts in proptest::collection::vec(1u32..40, 0..8),
            arrival in any::<u64>(),
        ) {
            let mut bounds: Vec<u32> = cuts.into_iter().filter(|c| *c < shards).chain([0, shards]).collect();
            bounds.sort_unstable();
            bounds.dedup();
            let ranges: Vec<Range<u32>> = bounds.windows(2).map(|w| w[0]..w[1]).collect();
            let partial = |s: u32| -> Vec<f32> { (0..33).map(|i| wild(u64::from(s) * 1000 + i)).collect() };
            let mut partials: Vec<Vec<f32>> = (0..shards).map(partial).collect();
            let plan = Plan::new(&ranges);

            let mut pieces = Vec::new();
            for (rank, range) in ranges.iter().enumerate() {
                let mut held = partials.clone();
                for Addition { left, right } in tree::subtree(shards, range.clone()) {
                    for i in 0..33 {
                        held[left as usize][i] += held[right as usize][i];
                    }
                }
                for (_, leaf) in plan.nodes_of(rank as u32) {
                    pieces.push((rank as u32, leaf, held[leaf as usize].clone()));
                }
            }
            pieces.sort_by_key(|(_, leaf, _)| mix64(arrival ^ u64::from(*leaf)));
            let one = (arrival % ranges.len() as u64) as u32;
            let (mut own, others): (Vec<_>, Vec<_>) = pieces.iter().cloned().partition(|(rank, ..)| *rank == one);
            own.sort_by_key(|(_, leaf, _)| *leaf);
            let own: Vec<&[f32]> = own.iter().map(|(.., values)| &values[..]).collect();
            let mut sums = Sums::default();
            for (rank, leaf, values) in others {
                prop_assert!(sums.complete(&plan, (9, 0), &own, 33).unwrap().is_none());
                prop_assert!(sums.deliver(&plan, (9, 0), (rank, leaf), values).unwrap().is_none());
            }
            let mut sum_of_last = [f32::NAN; 33];
            let all = sums.complete(&plan, (9, 0), &own, 33).unwrap().expect("all others were delivered");
            plan.sum_to(&mut sum_of_last, all, drop);
            prop_assert!(sums.open.is_empty());

            let (mut sums, mut finished) = (Sums::default(), None);
            for (rank, leaf, values) in pieces {
                prop_assert!(finished.is_none());
                if sums.open.contains_key(&(9, 0)) {
                    prop_assert!(sums.missing(&plan, 9).any(|missing| missing == rank));
                }
                finished = sums.deliver(&plan, (9, 0), (rank, leaf), values).unwrap();
            }
            let sum = plan.sum(finished.expect("all pieces were delivered"), drop);
            let bits: Vec<u32> = sum.iter().map(|v| v.to_bits()).collect();
            let expected = single_process(shards, &mut partials);
            prop_assert_eq!(sum_of_last.map(f32::to_bits).to_vec(), &expected[..]);
            prop_assert_eq!(bits, expected);
            prop_assert!(sums.open.is_empty());
        }

        #[test]
        fn slices_and_blocks_cover_a_bucket_once(len in 0usize..400_000, world_size in 1u32..40) {
            let mut end = 0;
            for rank in 0..world_size {
                let slice = slice(len, world_size, rank);
                prop_assert_eq!(slice.start, end);
                prop_assert!(slice.is_empty() || slice.start.is_multiple_of(ALIGN_FLOATS));
                prop_assert_eq!(blocks(slice.clone()).count(), block_count(slice.len()) as usize);
                for block in blocks(slice) {
                    prop_assert!(block.start == end && block.end > end);
                    end = block.end;
                }
            }
            prop_assert_eq!(end, len);
        }
    }

    #[test]
    fn pieces_that_do_not_fit_are_refused_in_words() {
        let plan = Plan::new(&[0..3, 3..8]);
        let mut sums = Sums::default();
        assert!(sums.deliver(&plan, (0, 0), (0, 0), vec![1.0; 4]).unwrap().is_none());
        let mut refusal = |rank, leaf, len| {
            sums.deliver(&plan, (0, 0), (rank, leaf), vec![1.0; len]).unwrap_err().to_string()
        };
        assert_eq!(refusal(0, 0, 4), "it sent the sum of the node at shard 0 twice");
        assert_eq!(refusal(0, 3, 4), "it sent the sum of a node at shard 3, which it does not hold");
        assert_eq!(refusal(1, 5, 4), "it sent the sum of a node at shard 5, which it does not hold");
        assert_eq!(refusal(1, 4, 3), "it sent 3 floats of a block, expected 4");
        for leaf in [3, 4] {
            let _ = sums.deliver(&plan, (1, 0), (1, leaf), vec![1.0; 3]).unwrap();
        }
        let own = [&[1.0; 4][..]; 2];
        let refused = sums.complete(&plan, (1, 0), &own, 4).unwrap_err();
        assert_eq!(refused, Refused::Length { actual: 4, expected: 3, other: 1 });
    }

    #[test]
    #[should_panic(expected = "rank 1 holds shards 3..3, expected at least one from shard 3 on")]
    fn a_rank_without_shards_is_a_bug_of_the_caller() {
        Plan::new(&[0..3, 3..3]);
    }
}
