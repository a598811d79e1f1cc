//! What the recurrent kernels share: how the runs and units of a sequence are cut into cubes, and the product of some
//! runs' states with the recurrent weights.
//!
//! A cube owns a tile of runs and some units, and has one thread for each gate of each of them, or several that share the
//! runs. Either it owns all units and runs all steps in one launch, passing the state on in shared memory; or a launch does
//! one step, and cubes share the units. Both are the same kernel: a step reads what the step before has left in memory, if
//! another launch has done it.
//!
//! A number of a run is a sum over k upwards in one accumulator, whatever the tile, the cut and the place of the weights.

use std::ops::Range;

use cubecl::prelude::*;
use protocol::cell::{Cell, RecurrentActivation, Reset};
use protocol::job::Precision;

use super::math::{hard_sigmoid, sigmoid};
use super::precision::rounded;

/// How a sequence is cut. Changes no bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Runs of a cube.
    pub rows: usize,
    /// Units of a cube.
    pub units: usize,
    /// Threads for each gate of each unit, which share the cube's runs; 1 if any weights are held.
    pub groups: usize,
    /// Whether one launch does all steps: a cube has all units.
    pub whole: bool,
    /// Weights of each thread that stay in its registers from step to step: those of the first so many k's.
    pub registers: usize,
    /// Weights of each thread that stay in shared memory: those of the next so many k's. The rest is read again and again.
    pub shared: usize,
}

/// What a device has for one cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Threads of a cube.
    pub threads: usize,
    /// Shared memory of a cube, in floats.
    pub shared: usize,
    /// Registers of a cube.
    pub registers: usize,
    /// Cubes that run at the same time.
    pub cubes: usize,
}

/// Most weights in registers of a thread: what a thread can have at most, without what else it needs.
const MOST_HELD: usize = 128;

/// Registers of a thread besides the weights that it holds. With fewer the compiler spills, which `scripts/cuda-check`
/// finds. See docs/design/gpu.md.
const OTHER_REGISTERS: usize = 32;

/// Those of each run of its cube.
const RUN_REGISTERS: usize = 16;

/// What a thread of the LSTM of 150 units needs besides its weights, at the least that the compiler can do with.
const FEWEST_OTHER_REGISTERS: usize = 32;

/// Weights for which the compiler would rather spill than let one cube run where two could.
const WORTH_SPILLING: usize = 16;

/// Units of a cube where a launch does one step: as few as fill the lines of memory. With more of them and fewer runs a step of
/// 64 runs and 512 units would read the weights, which all cubes of the same units do, from the cache more often.
const STEP_UNITS: usize = 16;

/// Most runs of a cube where a launch does one step, and of each of its threads.
const MOST_STEP_ROWS: usize = 16;
const MOST_STEP_ROWS_OF_A_THREAD: usize = 8;

/// Weights that a thread fetches from shared memory at a time.
const BLOCK: usize = 8;

/// Weights that a thread fetches from memory while it multiplies with as many, so that it waits for none: where a launch does
/// one step. There is no room for as many beside those that it holds where a launch does all.
const AHEAD: usize = 32;
const FEW_AHEAD: usize = 8;

/// Floats of shared memory for what a kernel keeps there in other variants: weights, and what a GRU resets.
const UNUSED: usize = 2;

/// Most runs of a cube.
const MOST_ROWS: usize = 4;

impl Limits {
    /// Those of the device behind a client.
    pub fn of<R: Runtime>(client: &ComputeClient<R>) -> Self {
        let hardware = &client.properties().hardware;
        Self {
            threads: hardware.max_units_per_cube as usize,
            shared: hardware.max_shared_memory_size / size_of::<f32>(),
            // Of a CUDA device; elsewhere nobody knows, and none is held in registers.
            registers: if hardware.plane_size_max == 32 && hardware.num_streaming_multiprocessors.is_some() {
                1 << 16
            } else {
                0
            },
            cubes: hardware.num_streaming_multiprocessors.unwrap_or(1) as usize,
        }
    }

    /// What each thread of a cube can have at most: NVIDIA's GPUs give them to four warps at a time, in eights.
    fn registers_of_a_thread(&self, threads: usize) -> usize {
        self.registers / threads.next_multiple_of(4 * 32) / 8 * 8
    }
}

/// What a kernel needs, as [`Plan::choose`] is told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Threads for each unit.
    pub gates: usize,
    /// Units, `H`.
    pub hidden: usize,
    /// Floats of shared memory for each run, whatever units a cube has.
    pub kept: usize,
    /// Longest sum over k.
    pub depth: usize,
    /// Whether a cube may have all units.
    pub can_be_whole: bool,
}

impl Needs {
    /// Those of a cell, for both ways.
    pub fn of(cell: Cell, reset: Reset, hidden: usize, output: usize) -> Self {
        let gates = cell.gates();
        // The state before a step or the gradients of its gates, and for a GRU that resets before the product what is
        // multiplied in its place.
        let extra = if cell == Cell::Gru && reset == Reset::Before { hidden } else { 0 };
        Self {
            gates,
            hidden,
            kept: output.max(gates * hidden) + extra,
            depth: output.max(hidden),
            can_be_whole: output == hidden,
        }
    }

    /// Floats of shared memory for each run in a cube of so many units, with what its threads exchange.
    pub(super) fn tile(&self, units: usize) -> usize {
        self.kept + self.gates * units
    }

    /// Floats of shared memory that a cube cannot do without.
    pub fn least_shared(&self, limits: Limits) -> usize {
        self.tile(self.step_units(limits)) + UNUSED
    }

    /// Units of a cube where a launch does one step.
    fn step_units(&self, limits: Limits) -> usize {
        STEP_UNITS.min(self.hidden).min(limits.threads / self.gates)
    }
}

impl Plan {
    /// The plan for so many runs on a device with these limits.
    pub fn choose(needs: Needs, runs: usize, limits: Limits) -> Self {
        let Needs { gates, hidden, depth, can_be_whole, .. } = needs;
        let tile = needs.tile(hidden);
        let threads = gates * hidden;
        let rows = runs.div_ceil(limits.cubes).clamp(1, MOST_ROWS);
        let fits = |rows: usize| threads <= limits.threads && rows * tile <= limits.shared;
        if !can_be_whole || !fits(1) {
            let units = needs.step_units(limits);
            let room = (limits.shared.saturating_sub(UNUSED) / needs.tile(units)).clamp(1, MOST_STEP_ROWS);
            // A power of 2, which groups divide.
            let rows = (1 << room.ilog2()).min(runs.next_power_of_two());
            let groups = rows.div_ceil(MOST_STEP_ROWS_OF_A_THREAD);
            return Self { rows, units, groups, whole: false, registers: 0, shared: 0 };
        }
        let rows = (1..=rows).rev().find(|&rows| fits(rows)).unwrap_or(1);
        let other = OTHER_REGISTERS + RUN_REGISTERS * rows;
        let registers = limits.registers_of_a_thread(threads).saturating_sub(other);
        let registers = registers.min(MOST_HELD).min(depth) / 8 * 8;
        let of_two_cubes =
            limits.registers_of_a_thread(2 * threads).saturating_sub(FEWEST_OTHER_REGISTERS) / 8 * 8;
        let is_little_more = (of_two_cubes + 1..of_two_cubes + WORTH_SPILLING).contains(&registers);
        let registers = if is_little_more { of_two_cubes } else { registers };
        let shared = ((limits.shared - rows * tile) / threads).min(depth - registers);
        Self { rows, units: hidden, groups: 1, whole: true, registers, shared }
    }

    /// Threads of a cube.
    pub(super) fn threads(&self, gates: usize) -> CubeDim {
        CubeDim::new_1d((self.groups * gates * self.units) as u32)
    }

    /// Runs of a thread.
    pub(super) fn rows_of_a_thread(&self) -> usize {
        self.rows / self.groups
    }

    /// How many units of runs a thread completes at most, see [`item`].
    pub(super) fn parts(&self, gates: usize) -> usize {
        self.rows.div_ceil(self.groups * gates)
    }

    /// Cubes for so many runs of a layer with `hidden` units.
    pub(super) fn cubes(&self, runs: usize, hidden: usize) -> CubeCount {
        CubeCount::Static(runs.div_ceil(self.rows) as u32, hidden.div_ceil(self.units) as u32, 1)
    }

    /// The launches that do so many steps, as ranges of them.
    pub(super) fn launches(&self, steps: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let each = if self.whole { steps } else { 1 };
        (0..steps).step_by(each.max(1)).map(move |first| first..first + each)
    }

    /// The same from the last step back, and to the start: where a launch does one step, that is one more.
    pub(super) fn launches_back(&self, steps: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let to_start = (!self.whole).then_some(0..0);
        self.launches(steps).rev().chain(to_start)
    }
}

/// The place of `HARD` sigmoids among comptime arguments.
pub(super) fn is_hard(activation: RecurrentActivation) -> bool {
    activation == RecurrentActivation::HardSigmoid
}

/// What gates do to their sums.
#[cube]
pub(super) fn gate(x: f32, #[comptime] hard: bool) -> f32 {
    if comptime!(hard) { hard_sigmoid(x) } else { sigmoid(x) }
}

/// The slope of a gate where its value is `y`.
#[cube]
pub(super) fn gate_slope(y: f32, #[comptime] hard: bool) -> f32 {
    if comptime!(hard) { select(y > 0.0 && y < 1.0, 0.2, 0.0) } else { y * (1.0 - y) }
}

/// Where a thread's weights are: that of k at `at + k·stride`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Column {
    pub(super) at: usize,
    pub(super) stride: usize,
}

/// Fetches the weights that stay with a thread and with its cube.
#[cube]
pub(super) fn hold(
    weight: &Array<f32>,
    column: Column,
    held: &mut Array<f32>,
    cached: &mut SharedMemory<f32>,
    #[comptime] plan: Plan,
) {
    let thread = UNIT_POS as usize;
    let threads = CUBE_DIM as usize;
    #[unroll]
    for k in 0..plan.registers {
        held[k] = weight[column.at + k * column.stride];
    }
    for k in 0..plan.shared {
        cached[k * threads + thread] = weight[column.at + (k + plan.registers) * column.stride];
    }
}

/// What a thread is for: the sums of one gate of one unit, for some runs of its cube.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Own {
    /// Its number among those of the same runs.
    pub(super) thread: usize,
    pub(super) gate: usize,
    pub(super) unit: usize,
    /// The unit is there: the last cube may have fewer than others.
    pub(super) is_unit: bool,
    /// The first of the runs, counted in the cube and in all.
    pub(super) first_row: usize,
    pub(super) first_run: usize,
}

#[cube]
pub(super) fn own(#[comptime] gates: usize, #[comptime] hidden: usize, #[comptime] plan: Plan) -> Own {
    let threads = comptime!(gates * plan.units);
    // Said so that the compiler has no doubt of it.
    let group = if comptime!(plan.groups == 1) { 0usize.runtime() } else { UNIT_POS as usize / threads };
    let thread = UNIT_POS as usize - group * threads;
    let unit = CUBE_POS_Y as usize * plan.units + thread % plan.units;
    let first_row = group * comptime!(plan.rows_of_a_thread());
    let first_run = CUBE_POS_X as usize * plan.rows + first_row;
    Own { thread, gate: thread / plan.units, unit, is_unit: unit < hidden, first_row, first_run }
}

/// Where a thread's weights are on the way forward, `[k][gate·H + unit]`.
#[cube]
pub(super) fn forward_column(own: Own, #[comptime] gates: usize, #[comptime] hidden: usize) -> Column {
    Column { at: select(own.is_unit, own.gate * hidden + own.unit, 0), stride: comptime!(gates * hidden) }
}

/// Where they are on the way back: it sums over the rows n of its gate, `[gate·H + n][unit]`.
#[cube]
pub(super) fn backward_column(own: Own, #[comptime] hidden: usize) -> Column {
    Column { at: select(own.is_unit, own.gate * comptime!(hidden * hidden) + own.unit, 0), stride: hidden }
}

/// A unit of a run that a thread completes when the sums of its gates are there. A cube has as many threads for each of its
/// units as that has gates, or a multiple, so each completes one unit of one run in as many.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Item {
    /// The run, counted in the cube and in all.
    pub(super) r: usize,
    pub(super) run: usize,
    pub(super) unit: usize,
    /// The run and the unit are there.
    pub(super) is_there: bool,
    /// Where the sum of the first gate is; those of the others follow at distances of the cube's units.
    pub(super) sum: usize,
}

#[cube]
pub(super) fn item(
    part: usize,
    runs: usize,
    #[comptime] gates: usize,
    #[comptime] hidden: usize,
    #[comptime] plan: Plan,
) -> Item {
    let at = UNIT_POS as usize + part * comptime!(plan.groups * gates * plan.units);
    let r = at / plan.units;
    let unit = CUBE_POS_Y as usize * plan.units + at % plan.units;
    let run = CUBE_POS_X as usize * plan.rows + r;
    let sum = r * comptime!(gates * plan.units) + at % plan.units;
    Item { r, run, unit, is_there: r < plan.rows && run < runs && unit < hidden, sum }
}

/// Fills `width` numbers of each run of a tile with zeros.
#[cube]
pub(super) fn clear(tile: &mut SharedMemory<f32>, #[comptime] width: usize, #[comptime] plan: Plan) {
    #[unroll]
    for r in 0..plan.rows {
        let n = RuntimeCell::<usize>::new(UNIT_POS as usize);
        while n.read() < width {
            tile[r * width + n.read()] = 0.0;
            n.store(n.read() + CUBE_DIM as usize);
        }
    }
}

/// Shows all threads of the cube what each has summed.
#[cube]
pub(super) fn share(
    sums: &Array<f32>,
    own: Own,
    exchange: &mut SharedMemory<f32>,
    #[comptime] gates: usize,
    #[comptime] plan: Plan,
) {
    let threads = comptime!(gates * plan.units);
    let first = own.first_row * threads + own.thread;
    #[unroll]
    for r in 0..comptime!(plan.rows_of_a_thread()) {
        exchange[first + r * threads] = sums[r];
    }
    sync_cube();
}

/// From zero: `sums[r] = Σ_k tile[r·stride + at + k] · weight(k)`, as [`multiply`].
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply_from_zero(
    tile: &SharedMemory<f32>,
    at: usize,
    #[comptime] stride: usize,
    weight: &Array<f32>,
    column: Column,
    held: &Array<f32>,
    cached: &SharedMemory<f32>,
    sums: &mut Array<f32>,
    #[comptime] depth: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for r in 0..comptime!(plan.rows_of_a_thread()) {
        sums[r] = 0.0;
    }
    multiply(tile, at, stride, weight, column, held, cached, sums, depth, plan);
}

/// `sums[r] += Σ_k tile[r·stride + at + k] · weight(k)` for the thread's runs, the first of which is `at`, k upwards from 0 to
/// `depth`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply(
    tile: &SharedMemory<f32>,
    at: usize,
    #[comptime] stride: usize,
    weight: &Array<f32>,
    column: Column,
    held: &Array<f32>,
    cached: &SharedMemory<f32>,
    sums: &mut Array<f32>,
    #[comptime] depth: usize,
    #[comptime] plan: Plan,
) {
    let thread = UNIT_POS as usize;
    let threads = CUBE_DIM as usize;
    #[unroll]
    for k in 0..plan.registers {
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            sums[r] = fma(tile[r * stride + at + k], held[k], sums[r]);
        }
    }
    // 0, but no compiler knows it. One that knows where these loops end unrolls them, and fetches the weights in memory
    // before the first step, into registers that there are not.
    let nothing = CUBE_POS_X as usize / CUBE_COUNT_X as usize;
    if comptime!(plan.shared >= BLOCK) {
        for block in 0..comptime!(plan.shared / BLOCK) + nothing {
            #[unroll]
            for i in 0..BLOCK {
                let cached_k = block * BLOCK + i;
                let w = cached[cached_k * threads + thread];
                #[unroll]
                for r in 0..comptime!(plan.rows_of_a_thread()) {
                    sums[r] = fma(tile[r * stride + at + cached_k + plan.registers], w, sums[r]);
                }
            }
        }
    }
    #[unroll]
    for cached_k in comptime!(plan.shared / BLOCK * BLOCK)..plan.shared {
        let w = cached[cached_k * threads + thread];
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            sums[r] = fma(tile[r * stride + at + cached_k + plan.registers], w, sums[r]);
        }
    }
    let on_chip = comptime!(plan.registers + plan.shared);
    let ahead = comptime!(if plan.whole { FEW_AHEAD } else { AHEAD });
    let blocks = comptime!((depth - on_chip) / ahead);
    if comptime!(blocks > 0) {
        let mut next = Array::<f32>::new(ahead);
        let mut now = Array::<f32>::new(ahead);
        #[unroll]
        for i in 0..ahead {
            next[i] = weight[column.at + (on_chip + i) * column.stride];
        }
        for block in 0..blocks + nothing {
            #[unroll]
            for i in 0..ahead {
                now[i] = next[i];
            }
            // Behind the last block nothing is needed: it comes once more.
            let next_k = on_chip + select(block + 1 < blocks, block + 1, block) * ahead;
            #[unroll]
            for i in 0..ahead {
                next[i] = weight[column.at + (next_k + i) * column.stride];
            }
            #[unroll]
            for i in 0..ahead {
                let k = on_chip + block * ahead + i;
                #[unroll]
                for r in 0..comptime!(plan.rows_of_a_thread()) {
                    sums[r] = fma(tile[r * stride + at + k], now[i], sums[r]);
                }
            }
        }
    }
    if comptime!(on_chip + blocks * ahead < depth) {
        for k in comptime!(on_chip + blocks * ahead)..depth + nothing {
            let w = weight[column.at + k * column.stride];
            #[unroll]
            for r in 0..comptime!(plan.rows_of_a_thread()) {
                sums[r] = fma(tile[r * stride + at + k], w, sums[r]);
            }
        }
    }
}

/// A run's state before a step, which a tile may have rounded.
#[cube]
pub(super) fn before(
    tile: &SharedMemory<f32>,
    tile_at: usize,
    h: &Array<f32>,
    h_at: usize,
    #[comptime] precision: Precision,
) -> f32 {
    if comptime!(precision == Precision::F32) { tile[tile_at] } else { h[h_at] }
}

/// Copies what the cube's runs have in memory, `[Nr][width]` from `at` on, into a tile `[rows][stride]` from its column
/// `tile_at` on, rounded; zeros for runs that are not there.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn fetch(
    from: &Array<f32>,
    at: usize,
    from_stride: usize,
    width: usize,
    runs: usize,
    tile: &mut SharedMemory<f32>,
    #[comptime] tile_at: usize,
    #[comptime] stride: usize,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let first_run = CUBE_POS_X as usize * plan.rows;
    let threads = CUBE_DIM as usize;
    #[unroll]
    for r in 0..plan.rows {
        let run = first_run + r;
        let is_there = run < runs;
        let row = select(is_there, at + run * from_stride, 0);
        let j = RuntimeCell::<usize>::new(UNIT_POS as usize);
        while j.read() < width {
            let value = rounded(from[row + j.read()], precision);
            tile[comptime!(r * stride + tile_at) + j.read()] = select(is_there, value, 0.0);
            j.store(j.read() + threads);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Limits = Limits { threads: 1024, shared: 227 * 256, registers: 1 << 16, cubes: 132 };
    const A100: Limits = Limits { threads: 1024, shared: 163 * 256, registers: 1 << 16, cubes: 108 };
    const LAVAPIPE: Limits = Limits { threads: 1024, shared: 32 * 256, registers: 0, cubes: 1 };

    fn plan(cell: Cell, hidden: usize, runs: usize, limits: Limits) -> Plan {
        Plan::choose(Needs::of(cell, Reset::After, hidden, hidden), runs, limits)
    }

    /// Where the weights of each small preset are: how many of each thread's in registers and in shared memory.
    #[test]
    fn a_gpu_keeps_the_weights_of_the_small_presets_on_the_chip() {
        for (name, cell, hidden, runs, on_h100, on_a100) in [
            ("char-lstm", Cell::Lstm, 128, 64, (80, 48), (80, 48)),
            ("char-gru", Cell::Gru, 128, 64, (120, 8), (120, 8)),
            ("mnist-rnn", Cell::Rnn, 150, 150, (128, 22), (128, 22)),
            // 360 KB, of which a multiprocessor holds four fifths at most beside what else it needs.
            ("mnist-lstm", Cell::Lstm, 150, 150, (32, 92), (32, 65)),
            ("mnist-gru", Cell::Gru, 150, 150, (64, 86), (64, 86)),
        ] {
            for (limits, on_chip) in [(H100, on_h100), (A100, on_a100)] {
                let plan = plan(cell, hidden, runs, limits);
                println!("{name}: {plan:?}");
                assert!(plan.whole, "{name}");
                assert!(plan.rows * limits.cubes >= runs, "{name}: all runs at the same time");
                assert_eq!((plan.registers, plan.shared), on_chip, "{name} of {hidden} units: {plan:?}");
            }
        }
    }

    #[test]
    fn a_large_layer_runs_step_by_step() {
        let plan = plan(Cell::Lstm, 512, 64, H100);
        assert_eq!((plan.whole, plan.units, plan.rows, plan.groups), (false, 16, 16, 2));
        let small = self::plan(Cell::Lstm, 33, 5, LAVAPIPE);
        assert!(small.whole && small.registers == 0 && small.rows * 8 * 33 <= LAVAPIPE.shared);
        assert!(!self::plan(Cell::Lstm, 512, 5, LAVAPIPE).whole);
        assert_eq!(
            self::plan(Cell::Lstm, 512, 5, LAVAPIPE).launches(3).collect::<Vec<_>>(),
            [0..1, 1..2, 2..3]
        );
    }

    #[test]
    fn a_layer_that_no_cube_holds_is_known_before() {
        let fits = |hidden, limits: Limits| {
            Needs::of(Cell::Lstm, Reset::After, hidden, hidden).least_shared(limits) <= limits.shared
        };
        assert!(fits(2_000, LAVAPIPE) && !fits(2_048, LAVAPIPE));
        assert!(fits(14_000, H100) && !fits(16_384, H100));
        let plan = self::plan(Cell::Lstm, 2_000, 5, LAVAPIPE);
        assert_eq!((plan.whole, plan.rows, plan.units), (false, 1, 16));
    }

    #[test]
    fn a_projection_runs_step_by_step() {
        let needs = Needs::of(Cell::Lstm, Reset::After, 12, 7);
        assert!(!Plan::choose(needs, 5, H100).whole);
    }
}
