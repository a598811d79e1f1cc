//! The fixed binary tree over the shard index, and how a range of shards is covered by its nodes.
//!
//! Sums across rows are taken per shard; the shards' partial sums are added along this tree and in no other order,
//! so the result is the same however the shards are spread over workers. The tree has `S` leaves. On each level
//! neighbours are paired from the left; an odd node at the end passes through unchanged. Node `(level, index)`
//! covers shards `index·2^level .. min((index + 1)·2^level, S)`.

use std::ops::Range;

/// One node of the tree: the sum over the shards `index·2^level .. min((index + 1)·2^level, S)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TreeNode {
    /// 0 for a leaf (one shard).
    pub level: u32,
    /// Position on its level, from the left.
    pub index: u32,
}

impl TreeNode {
    /// The shards below this node in a tree of `shards` leaves.
    pub fn range(self, shards: u32) -> Range<u32> {
        let (start, end) = (u64::from(self.index) << self.level, u64::from(self.index + 1) << self.level);
        (start.min(u64::from(shards)) as u32)..(end.min(u64::from(shards)) as u32)
    }

    /// The two nodes whose values are added to give this one's, in a tree of `shards` leaves. The second is missing
    /// where the first passes through; a leaf has none.
    pub fn children(self, shards: u32) -> Option<(TreeNode, Option<TreeNode>)> {
        let level = self.level.checked_sub(1)?;
        let [left, right] = [0, 1].map(|side| TreeNode { level, index: 2 * self.index + side });
        Some((left, Some(right).filter(|right| !right.range(shards).is_empty())))
    }
}

/// One addition of the tree: the value held at leaf `right` is added to the value held at leaf `left`.
///
/// A node's value is kept in the place of its leftmost leaf, so a whole tree needs no space beyond its leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addition {
    /// Leaf whose place holds the left operand and then the sum.
    pub left: u32,
    /// Leaf whose place holds the right operand.
    pub right: u32,
}

/// Number of levels above the leaves: the root of `shards` leaves is `(levels(shards), 0)`.
pub fn levels(shards: u32) -> u32 {
    shards.next_power_of_two().trailing_zeros()
}

/// All additions of the tree over `shards` leaves, in an order that is valid to execute: level by level, from the
/// left. After the last one the place of leaf 0 holds the sum of all shards.
pub fn tree(shards: u32) -> Vec<Addition> {
    subtree(shards, 0..shards)
}

/// The additions whose two operands both lie inside `range`: what a worker that holds these shards can do alone.
/// Afterwards the places of the leftmost leaves of `cover(shards, range)` hold those nodes' values.
pub fn subtree(shards: u32, range: Range<u32>) -> Vec<Addition> {
    let mut additions = Vec::new();
    for level in 0..levels(shards) {
        let (half, span) = (1u64 << level, 2u64 << level);
        let mut left = u64::from(range.start).next_multiple_of(span);
        while left + half < u64::from(range.end) {
            // The right operand may be cut short by the end of the tree, never by the end of the range.
            if (left + span).min(u64::from(shards)) <= u64::from(range.end) {
                additions.push(Addition { left: left as u32, right: (left + half) as u32 });
            }
            left += span;
        }
    }
    additions
}

/// The largest tree nodes that together are exactly `range`, from left to right: at most two per level.
///
/// A worker that holds `range` sends these nodes' values and nothing else. An empty range has no nodes.
pub fn cover(shards: u32, range: Range<u32>) -> Vec<TreeNode> {
    assert!(range.end <= shards, "cover: the range ends at shard {}, there are {shards}", range.end);
    let mut nodes = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let mut node = TreeNode { level: 0, index: start };
        loop {
            let parent = TreeNode { level: node.level + 1, index: node.index / 2 };
            let covered = parent.range(shards);
            if node.level == levels(shards) || covered.start != start || covered.end > range.end {
                break;
            }
            node = parent;
        }
        start = node.range(shards).end;
        nodes.push(node);
    }
    nodes
}

/// The additions that finish the tree once the nodes of several covers, together all shards, are at hand.
/// `leaves` are the leftmost leaves of these nodes.
pub fn remaining(shards: u32, covers: &[TreeNode]) -> Vec<Addition> {
    let done: std::collections::HashSet<(u32, u32)> = covers
        .iter()
        .flat_map(|node| subtree(shards, node.range(shards)))
        .map(|addition| (addition.left, addition.right))
        .collect();
    tree(shards).into_iter().filter(|addition| !done.contains(&(addition.left, addition.right))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A sum written as text shows the order of its additions.
    fn execute(additions: &[Addition], places: &mut [String]) {
        for &Addition { left, right } in additions {
            places[left as usize] = format!("({}+{})", places[left as usize], places[right as usize]);
        }
    }

    fn leaves(shards: u32) -> Vec<String> {
        (0..shards).map(|s| s.to_string()).collect()
    }

    #[test]
    fn the_tree_pairs_neighbours_and_passes_an_odd_node_through() {
        let written = |shards| {
            let mut places = leaves(shards);
            execute(&tree(shards), &mut places);
            places[0].clone()
        };
        assert_eq!(written(1), "0");
        assert_eq!(written(2), "(0+1)");
        assert_eq!(written(3), "((0+1)+2)");
        assert_eq!(written(5), "(((0+1)+(2+3))+4)");
        assert_eq!(written(7), "(((0+1)+(2+3))+((4+5)+6))");
        assert_eq!(written(8), "(((0+1)+(2+3))+((4+5)+(6+7)))");
    }

    #[test]
    fn children_are_the_operands_of_the_additions() {
        fn written(node: TreeNode, shards: u32) -> String {
            match node.children(shards) {
                None => node.index.to_string(),
                Some((left, None)) => written(left, shards),
                Some((left, Some(right))) => {
                    format!("({}+{})", written(left, shards), written(right, shards))
                }
            }
        }
        for shards in 1..40 {
            let mut places = leaves(shards);
            execute(&tree(shards), &mut places);
            assert_eq!(written(TreeNode { level: levels(shards), index: 0 }, shards), places[0]);
        }
    }

    #[test]
    fn covers_are_the_largest_nodes() {
        let nodes = |shards, range| cover(shards, range).iter().map(|n| n.range(shards)).collect::<Vec<_>>();
        assert_eq!(nodes(8, 0..8), [0..8]);
        assert_eq!(nodes(8, 2..5), [2..4, 4..5]);
        assert_eq!(nodes(7, 4..7), [4..7]);
        assert_eq!(nodes(7, 3..7), [3..4, 4..7]);
        assert_eq!(nodes(7, 3..6), [3..4, 4..6]);
        assert_eq!(nodes(5, 2..2), Vec::<Range<u32>>::new());
    }

    proptest! {
        #[test]
        fn any_split_into_ranges_gives_the_sum_of_one_worker(
            shards in 1u32..200,
            cuts in proptest::collection::vec(0u32..200, 0..9),
        ) {
            let mut bounds: Vec<u32> = cuts.into_iter().map(|c| c % (shards + 1)).collect();
            bounds.extend([0, shards]);
            bounds.sort_unstable();
            let mut alone = leaves(shards);
            execute(&tree(shards), &mut alone);

            let (mut nodes, mut places) = (Vec::new(), leaves(shards));
            for range in bounds.windows(2).map(|w| w[0]..w[1]) {
                execute(&subtree(shards, range.clone()), &mut places);
                let covered = cover(shards, range.clone());
                prop_assert!(covered.len() <= 2 * levels(shards) as usize + 1);
                prop_assert_eq!(covered.iter().map(|n| n.range(shards).len()).sum::<usize>(), range.len());
                nodes.extend(covered);
            }
            // Only the nodes' own places travel; every other place is unreadable for the finisher.
            let held: Vec<u32> = nodes.iter().map(|n| n.range(shards).start).collect();
            for (leaf, place) in places.iter_mut().enumerate() {
                if !held.contains(&(leaf as u32)) {
                    *place = "lost".into();
                }
            }
            execute(&remaining(shards, &nodes), &mut places);
            prop_assert_eq!(&places[0], &alone[0]);
        }
    }
}
