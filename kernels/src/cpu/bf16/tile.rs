//! A block of C, at most 2 × 2 tiles, over all of k: in AMX's tile registers, or as `multiply_adds.rs` does it.

use super::super::simd::{Simd, SimdLevel};
use super::{DEPTH, TILE, Tile, multiply_adds};

/// What a block is computed from, and where it goes. `product.rs` checks the pointers.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// 1 to 32.
    pub(super) rows: usize,
    /// 1 to 32.
    pub(super) columns: usize,
    /// Tiles `[k / DEPTH]` of the first sixteen rows, and of the others if there are some.
    pub(super) left: [&'a [Tile]; 2],
    /// The same of columns.
    pub(super) right: [&'a [Tile]; 2],
    /// What the block is added to: rows `start_stride` elements apart, which may be 0.
    pub(super) start: *const f32,
    pub(super) start_stride: usize,
    /// The block, rows `c_stride` elements apart. It may be the start.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
}

/// Computes blocks one after the other. While it lives, this thread's tile registers are its own.
pub(super) struct Tiles {
    simd: Simd,
    /// Rows and columns for which the tile registers are set up: 0 before the first block.
    shape: (usize, usize),
}

impl Tiles {
    pub(super) fn new(simd: Simd) -> Self {
        Self { simd, shape: (0, 0) }
    }

    /// Computes a block.
    ///
    /// # Safety
    /// For each of the block's rows and columns `start` must be readable and `c` writable; C overlaps neither operand, and
    /// the start only as the same element.
    pub(super) unsafe fn compute(&mut self, block: &Block<'_>) {
        debug_assert!((1..=2 * TILE).contains(&block.rows) && (1..=2 * TILE).contains(&block.columns));
        match self.simd.level() {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            SimdLevel::Amx => {
                let shape = (block.rows, block.columns);
                // SAFETY: this level is only built where AMX was found and Linux lets this process use it; the pointers are
                // the caller's promise.
                unsafe {
                    if self.shape != shape {
                        x86::set_up(shape);
                        self.shape = shape;
                    }
                    x86::compute(block);
                }
            }
            // SAFETY: the caller's promise.
            _ => unsafe { multiply_adds::compute(self.simd, block) },
        }
    }
}

/// Multiply-adds in the tile registers: `rounds` in each of six chains of tiles. Gives the number of floating-point operations.
///
/// # Panics
/// Without AMX.
pub(crate) fn multiply_add(simd: Simd, rounds: u64) -> u64 {
    assert!(simd.level() == SimdLevel::Amx, "tile registers at the level {simd}");
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    // SAFETY: this level is only built where AMX was found and Linux lets this process use it.
    unsafe {
        x86::set_up((2 * TILE, 2 * TILE));
        x86::multiply_add(rounds);
        x86::release();
    }
    2 * 6 * (TILE * TILE * DEPTH) as u64 * rounds
}

impl Drop for Tiles {
    /// Empties the tile registers, so that no switch to another thread has to save them.
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.shape != (0, 0) {
            // SAFETY: only AMX sets a shape.
            unsafe { x86::release() };
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod x86 {
    use super::{Block, TILE};
    use std::arch::asm;

    /// What the tile registers hold: of C 0 to 3, of A 4 and 5, of B 6 and 7.
    #[repr(C, align(64))]
    struct Palette {
        /// 1: eight registers of up to sixteen rows of up to 64 bytes.
        number: u8,
        _reserved: [u8; 15],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Bytes of a tile.
    const TILE_BYTES: usize = size_of::<super::Tile>();
    /// Bytes of a tile's row.
    const ROW_BYTES: usize = TILE_BYTES / TILE;

    /// Sets the registers up for blocks of so many rows and columns.
    ///
    /// # Safety
    /// The processor has AMX and the process may use it.
    pub(super) unsafe fn set_up((rows, columns): (usize, usize)) {
        // A register that is not needed keeps a row: none may be without.
        let parts = |all: usize| [all.min(TILE), all.saturating_sub(TILE).max(1)];
        let (rows, columns) = (parts(rows), parts(columns));
        let mut palette = Palette { number: 1, _reserved: [0; 15], row_bytes: [0; 16], rows: [0; 16] };
        let mut register = |at: usize, rows: usize, words: usize| {
            palette.rows[at] = rows as u8;
            palette.row_bytes[at] = 4 * words as u16;
        };
        for (row, &rows) in rows.iter().enumerate() {
            for (column, &columns) in columns.iter().enumerate() {
                register(2 * row + column, rows, columns);
            }
            register(4 + row, rows, TILE);
        }
        for (column, &columns) in columns.iter().enumerate() {
            register(6 + column, TILE, columns);
        }
        // SAFETY: the caller's promise; the palette is a valid one of 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &palette, options(nostack, readonly, preserves_flags));
        }
    }

    /// # Safety
    /// As for [`set_up`].
    pub(super) unsafe fn release() {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    /// # Safety
    /// As for [`set_up`], and the registers are set up.
    pub(super) unsafe fn multiply_add(rounds: u64) {
        if rounds == 0 {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "tdpbf16ps tmm1, tmm6, tmm7",
                "tdpbf16ps tmm2, tmm6, tmm7",
                "tdpbf16ps tmm3, tmm6, tmm7",
                "tdpbf16ps tmm4, tmm6, tmm7",
                "tdpbf16ps tmm5, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack)
            );
        }
    }

    /// The instructions for blocks of one shape: what is loaded before, what is done with each tile of k, what is stored.
    macro_rules! instructions {
        ($block:expr, $depth:expr, [$($load:literal)*], [$($step:literal)*], [$($store:literal)*]) => {{
            let Block { left, right, start, start_stride, c, c_stride, .. } = *$block;
            asm!(
                $($load,)*
                "2:",
                $($step,)*
                "add {left_0}, {tile_bytes}",
                "add {left_1}, {tile_bytes}",
                "add {right_0}, {tile_bytes}",
                "add {right_1}, {tile_bytes}",
                "dec {depth}",
                "jnz 2b",
                $($store,)*
                // Not all shapes name all of these.
                "/* {start_1} {c_1} */",
                start_0 = in(reg) start,
                start_1 = in(reg) start.wrapping_add(TILE * start_stride),
                start_stride = in(reg) 4 * start_stride,
                c_0 = in(reg) c,
                c_1 = in(reg) c.wrapping_add(TILE * c_stride),
                c_stride = in(reg) 4 * c_stride,
                left_0 = inout(reg) left[0].as_ptr() => _,
                left_1 = inout(reg) left[1].as_ptr() => _,
                right_0 = inout(reg) right[0].as_ptr() => _,
                right_1 = inout(reg) right[1].as_ptr() => _,
                depth = inout(reg) $depth => _,
                row_bytes = in(reg) ROW_BYTES,
                tile_bytes = const TILE_BYTES,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }};
    }

    /// # Safety
    /// As for [`super::Tiles::compute`], with the registers set up for the block's shape.
    pub(super) unsafe fn compute(block: &Block<'_>) {
        let depth = block.left[0].len();
        let has = |tiles: &[super::Tile]| tiles.len() == depth;
        let (two_rows, two_columns) = (block.rows > TILE, block.columns > TILE);
        assert!(
            depth > 0
                && has(block.right[0])
                && (!two_rows || has(block.left[1]))
                && (!two_columns || has(block.right[1])),
            "bf16: operands of different k"
        );
        // SAFETY: the caller's promise for start and c; the operands have `depth` tiles of TILE_BYTES each.
        unsafe {
            match (two_rows, two_columns) {
                (true, true) => instructions!(block, depth,
                    ["tileloadd tmm0, [{start_0} + {start_stride}]"
                     "tileloadd tmm1, [{start_0} + {start_stride} + 64]"
                     "tileloadd tmm2, [{start_1} + {start_stride}]"
                     "tileloadd tmm3, [{start_1} + {start_stride} + 64]"],
                    ["tileloadd tmm4, [{left_0} + {row_bytes}]"
                     "tileloadd tmm6, [{right_0} + {row_bytes}]"
                     "tdpbf16ps tmm0, tmm4, tmm6"
                     "tileloadd tmm7, [{right_1} + {row_bytes}]"
                     "tdpbf16ps tmm1, tmm4, tmm7"
                     "tileloadd tmm5, [{left_1} + {row_bytes}]"
                     "tdpbf16ps tmm2, tmm5, tmm6"
                     "tdpbf16ps tmm3, tmm5, tmm7"],
                    ["tilestored [{c_0} + {c_stride}], tmm0"
                     "tilestored [{c_0} + {c_stride} + 64], tmm1"
                     "tilestored [{c_1} + {c_stride}], tmm2"
                     "tilestored [{c_1} + {c_stride} + 64], tmm3"]),
                (true, false) => instructions!(block, depth,
                    ["tileloadd tmm0, [{start_0} + {start_stride}]"
                     "tileloadd tmm2, [{start_1} + {start_stride}]"],
                    ["tileloadd tmm4, [{left_0} + {row_bytes}]"
                     "tileloadd tmm6, [{right_0} + {row_bytes}]"
                     "tdpbf16ps tmm0, tmm4, tmm6"
                     "tileloadd tmm5, [{left_1} + {row_bytes}]"
                     "tdpbf16ps tmm2, tmm5, tmm6"],
                    ["tilestored [{c_0} + {c_stride}], tmm0"
                     "tilestored [{c_1} + {c_stride}], tmm2"]),
                (false, true) => instructions!(block, depth,
                    ["tileloadd tmm0, [{start_0} + {start_stride}]"
                     "tileloadd tmm1, [{start_0} + {start_stride} + 64]"],
                    ["tileloadd tmm4, [{left_0} + {row_bytes}]"
                     "tileloadd tmm6, [{right_0} + {row_bytes}]"
                     "tdpbf16ps tmm0, tmm4, tmm6"
                     "tileloadd tmm7, [{right_1} + {row_bytes}]"
                     "tdpbf16ps tmm1, tmm4, tmm7"],
                    ["tilestored [{c_0} + {c_stride}], tmm0"
                     "tilestored [{c_0} + {c_stride} + 64], tmm1"]),
                (false, false) => instructions!(block, depth,
                    ["tileloadd tmm0, [{start_0} + {start_stride}]"],
                    ["tileloadd tmm4, [{left_0} + {row_bytes}]"
                     "tileloadd tmm6, [{right_0} + {row_bytes}]"
                     "tdpbf16ps tmm0, tmm4, tmm6"],
                    ["tilestored [{c_0} + {c_stride}], tmm0"]),
            }
        }
    }
}
