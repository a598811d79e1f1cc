//! The loops around the blocks of a product.

use std::cell::RefCell;

use super::super::gemm::Start;
use super::super::pack::{PackedLeft, PackedMatrix};
use super::super::simd::Simd;
use super::tile::{Block, Tiles};
use super::{DEPTH, TILE, Tile, pack};

/// Rows and columns of a block: what the tile registers hold of C.
const BLOCK: usize = 2 * TILE;

/// What is multiplied with a packed matrix.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Rows of f32, so many elements apart.
    Rows(&'a [f32], usize),
    /// Columns, packed.
    Packed(&'a PackedLeft),
}

/// Rows that meet a panel of B while it is in the first-level cache; their part of A stays in the second-level one. Changes
/// no bit.
const ROW_BLOCK: usize = 4 * BLOCK;

thread_local! {
    /// The rows of a `ROW_BLOCK` as tiles, `[rows / 16][k / DEPTH]`.
    static ROWS: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// `c[m, n] = start + a · b`. The callers in `gemm.rs` have checked the shapes.
pub(crate) fn product(
    simd: Simd,
    m: usize,
    left: Left<'_>,
    b: &PackedMatrix,
    c: &mut [f32],
    ldc: usize,
    start: Start<'_>,
) {
    ROWS.with_borrow_mut(|room| {
        let (k, n) = (b.k(), b.n());
        let depth = k.div_ceil(DEPTH);
        let mut tiles = Tiles::new(simd);
        let zeros = [0.0; BLOCK];
        let mut gathered = [[0.0; BLOCK]; BLOCK];
        // One pointer from which all others come: blocks read and write C through it.
        let c = c.as_mut_ptr();
        let mut first_of_block = 0;
        while first_of_block < m {
            // Rows that make no whole block are taken last: the tile registers are then set up once for them.
            let left_over = m - first_of_block;
            let rows_of_block =
                if left_over < BLOCK { left_over } else { ROW_BLOCK.min(left_over / BLOCK * BLOCK) };
            let left = match left {
                Left::Rows(a, lda) => {
                    let count = pack::tiles_of(k, rows_of_block);
                    room.resize(count.max(room.len()), Tile([[0; TILE]; TILE]));
                    for (at, room) in (0..rows_of_block).step_by(TILE).zip(room.chunks_exact_mut(depth)) {
                        let rows = TILE.min(rows_of_block - at);
                        pack::pack_rows(simd, rows, k, &a[(first_of_block + at) * lda..], lda, room);
                    }
                    &room[..count]
                }
                Left::Packed(packed) => &packed.tiles()[pack::tiles_of(k, first_of_block)..],
            };
            for first_column in (0..n).step_by(BLOCK) {
                let columns = BLOCK.min(n - first_column);
                let right = halves(b.tiles(), first_column, columns, depth);
                for at in (0..rows_of_block).step_by(BLOCK) {
                    let (first_row, rows) = (first_of_block + at, BLOCK.min(rows_of_block - at));
                    let own = c.wrapping_add(first_row * ldc + first_column);
                    let (start, start_stride) = match start {
                        Start::Zero => (zeros.as_ptr(), 0),
                        Start::Kept => (own.cast_const(), ldc),
                        Start::Row(row) => (row[first_column..].as_ptr(), 0),
                        Start::Table { table, tokens } => {
                            for (row, token) in gathered.iter_mut().zip(&tokens[first_row..][..rows]) {
                                let from = &table[*token as usize * n + first_column..][..columns];
                                // A copy of a constant length is a few moves, any other is a call.
                                match from.first_chunk::<BLOCK>() {
                                    Some(all) => *row = *all,
                                    None => row[..columns].copy_from_slice(from),
                                }
                            }
                            (gathered.as_ptr().cast(), BLOCK)
                        }
                    };
                    // The block below, or the one beside.
                    let next = if at + BLOCK < rows_of_block { BLOCK * ldc } else { BLOCK };
                    ask_for(own.wrapping_add(next), rows, ldc);
                    let left = halves(left, at, rows, depth);
                    let block =
                        Block { rows, columns, left, right, start, start_stride, c: own, c_stride: ldc };
                    // SAFETY: the callers' `assert_extent` covers the block's rows and columns of C, which is borrowed
                    // exclusively; the start is C itself, or has been sliced or filled for so many rows and columns.
                    unsafe { tiles.compute(&block) };
                }
            }
            first_of_block += rows_of_block;
        }
    });
}

/// Asks the memory for the room of a block, as one's own: its rows may lie so that the cache cannot hold all of them for
/// long, and the processor does not fetch ahead from row to row.
fn ask_for(block: *const f32, rows: usize, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    for row in 0..rows {
        for line in 0..BLOCK / TILE {
            // SAFETY: a prefetch reads nothing that the program could see, from any address.
            unsafe {
                std::arch::asm!(
                    "prefetchw [{}]",
                    in(reg) block.wrapping_add(row * stride + line * TILE),
                    options(nostack, preserves_flags)
                );
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, rows, stride);
}

/// The tiles of the sixteen rows or columns from `first` on, and those of the next sixteen, or none.
fn halves(tiles: &[Tile], first: usize, count: usize, depth: usize) -> [&[Tile]; 2] {
    let of = |panel: usize| &tiles[panel * depth..][..depth];
    let panel = first / TILE;
    [of(panel), if count > TILE { of(panel + 1) } else { &[] }]
}
