//! What lies between the layers: inputs into their places, starts and ends of runs, the turn of a direction that reads
//! backwards.
//!
//! Everything is stored step by step, `[T][Nr][w]`; a step beyond its run's end has numbers, but nobody asks which.

use cubecl::prelude::*;

use super::buffer::{Buffer, UNITS, cubes};

/// How many steps and runs, `T` and `Nr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Of the longest run, `T`.
    pub steps: usize,
    /// `Nr`.
    pub runs: usize,
}

impl Extent {
    /// Places of what is stored by step.
    pub fn places(self) -> usize {
        self.steps * self.runs
    }
}

/// Where the step that another direction has at `t` is, in a run of this length.
#[cube]
pub(super) fn turned(t: usize, length: usize) -> usize {
    select(t < length, length - 1 - t, t)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn token_rows_kernel(
    tokens: &Array<u32>,
    table: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<f32>,
    places: usize,
    width: usize,
    at: usize,
    token_stride: usize,
    column_stride: usize,
    #[comptime] adds_bias: bool,
) {
    if ABSOLUTE_POS < places * width {
        let (place, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let token = tokens[place] as usize;
        let value = table[at + token * token_stride + column * column_stride];
        if comptime!(adds_bias) {
            out[ABSOLUTE_POS] = value + bias[column];
        } else {
            out[ABSOLUTE_POS] = value;
        }
    }
}

/// A table with something for each token: element (token, column) at `at + token·token_stride + column·column_stride`.
#[derive(Debug, Clone, Copy)]
pub struct TokenTable<'a> {
    /// Where it lies.
    pub buffer: &'a Buffer,
    /// Its first element.
    pub at: usize,
    /// Distance between tokens.
    pub token_stride: usize,
    /// Distance between columns.
    pub column_stride: usize,
}

/// The row of each place's token `[T][Nr]`, plus a bias `[width]` if there is one: `[T][Nr][width]`.
pub fn token_rows<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    tokens: &Buffer,
    table: TokenTable<'_>,
    width: usize,
    bias: Option<&Buffer>,
    out: &Buffer,
) {
    // SAFETY: one element for each unit; tokens are below the table's rows.
    unsafe {
        token_rows_kernel::launch_unchecked::<R>(
            client,
            cubes(extent.places() * width),
            CubeDim::new_1d(UNITS),
            tokens.arg(),
            table.buffer.arg(),
            bias.unwrap_or(table.buffer).arg(),
            out.arg(),
            extent.places(),
            width,
            table.at,
            table.token_stride,
            table.column_stride,
            bias.is_some(),
        );
    }
}

#[cube(launch_unchecked)]
fn bytes_kernel(words: &Array<u32>, out: &mut Array<f32>, len: usize) {
    if ABSOLUTE_POS < len {
        let byte = (words[ABSOLUTE_POS / 4] >> ((ABSOLUTE_POS % 4) as u32 * 8)) & 255u32;
        out[ABSOLUTE_POS] = f32::cast_from(byte) / 255.0;
    }
}

/// Bytes, four in a word from the lowest on, each divided by 255.
pub fn scaled_bytes<R: Runtime>(client: &ComputeClient<R>, words: &Buffer, out: &Buffer) {
    assert!(out.len() <= 4 * words.len(), "scaled_bytes: {} words for {} bytes", words.len(), out.len());
    // SAFETY: one element for each unit, of a word that is there.
    unsafe {
        bytes_kernel::launch_unchecked::<R>(
            client,
            cubes(out.len()),
            CubeDim::new_1d(UNITS),
            words.arg(),
            out.arg(),
            out.len(),
        );
    }
}

#[cube(launch_unchecked)]
fn turn_kernel(
    lengths: &Array<u32>,
    from: &Array<f32>,
    to: &mut Array<f32>,
    places: usize,
    runs: usize,
    width: usize,
    #[comptime] adds: bool,
) {
    if ABSOLUTE_POS < places * width {
        let (place, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let run = place % runs;
        let source = turned(place / runs, lengths[run] as usize) * runs + run;
        let value = from[source * width + column];
        if comptime!(adds) {
            to[ABSOLUTE_POS] = to[ABSOLUTE_POS] + value;
        } else {
            to[ABSOLUTE_POS] = value;
        }
    }
}

/// Turns `[T][Nr][width]` round in every run; with `adds`, adds it to what is there.
pub fn turn<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    lengths: &Buffer,
    width: usize,
    from: &Buffer,
    to: &Buffer,
    adds: bool,
) {
    // SAFETY: one element for each unit; the places lie inside both buffers.
    unsafe {
        turn_kernel::launch_unchecked::<R>(
            client,
            cubes(extent.places() * width),
            CubeDim::new_1d(UNITS),
            lengths.arg(),
            from.arg(),
            to.arg(),
            extent.places(),
            extent.runs,
            width,
            adds,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn start_kernel(
    slots: &Array<u32>,
    state: &Array<f32>,
    initial: &Array<f32>,
    start: &mut Array<f32>,
    runs: usize,
    width: usize,
    state_size: usize,
    state_at: usize,
) {
    if ABSOLUTE_POS < runs * width {
        let (run, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        // One more than the slot that the run goes on from, 0 for none.
        let slot = slots[run] as usize;
        let goes_on = slot > 0;
        let from = select(goes_on, (slot - select(goes_on, 1, 0)) * state_size + state_at + column, 0);
        start[ABSOLUTE_POS] = select(goes_on, state[from], initial[column]);
    }
}

/// A part of a slot's recurrent state: which floats of each, and of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatePart {
    /// First of the floats.
    pub at: usize,
    /// Number of floats.
    pub width: usize,
    /// Of the whole state of a slot.
    pub state_size: usize,
}

/// The start of every run `[Nr][width]`: the state of its slot, or the initial state `[width]`. `slots` `[Nr]` has the
/// slot plus one, or 0 for the initial state.
pub fn starts<R: Runtime>(
    client: &ComputeClient<R>,
    slots: &Buffer,
    part: StatePart,
    state: &Buffer,
    initial: &Buffer,
    start: &Buffer,
) {
    let runs = slots.len();
    // SAFETY: one element for each unit; slots lie inside the state.
    unsafe {
        start_kernel::launch_unchecked::<R>(
            client,
            cubes(runs * part.width),
            CubeDim::new_1d(UNITS),
            slots.arg(),
            state.arg(),
            initial.arg(),
            start.arg(),
            runs,
            part.width,
            part.state_size,
            part.at,
        );
    }
}

#[cube(launch_unchecked)]
fn fresh_kernel(slots: &Array<u32>, d_start: &mut Array<f32>, runs: usize, width: usize) {
    if ABSOLUTE_POS < runs * width && slots[ABSOLUTE_POS / width] > 0u32 {
        d_start[ABSOLUTE_POS] = 0.0;
    }
}

/// Forgets the gradient `[Nr][width]` of the starts that were not the initial state; `slots` as for [`starts`].
pub fn keep_fresh<R: Runtime>(client: &ComputeClient<R>, slots: &Buffer, width: usize, d_start: &Buffer) {
    // SAFETY: one element for each unit.
    unsafe {
        fresh_kernel::launch_unchecked::<R>(
            client,
            cubes(slots.len() * width),
            CubeDim::new_1d(UNITS),
            slots.arg(),
            d_start.arg(),
            slots.len(),
            width,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn end_kernel(
    ends: &Array<u32>,
    from: &Array<f32>,
    to: &mut Array<f32>,
    rows: usize,
    width: usize,
    from_at: usize,
    first_row: usize,
    to_stride: usize,
    to_at: usize,
) {
    if ABSOLUTE_POS < rows * width {
        let (row, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let run = ends[row] as usize;
        to[(first_row + row) * to_stride + to_at + column] = from[from_at + run * width + column];
    }
}

/// The end of some runs to where rows have it: `to[first_row + row][at ..] = from[ends[row]]`, `from` being `[Nr][width]`
/// from `from_at` on and `to`'s rows `part.state_size` apart.
pub fn ends<R: Runtime>(
    client: &ComputeClient<R>,
    ends: &Buffer,
    part: StatePart,
    (from, from_at): (&Buffer, usize),
    first_row: usize,
    to: &Buffer,
) {
    let rows = ends.len();
    // SAFETY: one element for each unit; runs lie inside `from`, rows inside `to`.
    unsafe {
        end_kernel::launch_unchecked::<R>(
            client,
            cubes(rows * part.width),
            CubeDim::new_1d(UNITS),
            ends.arg(),
            from.arg(),
            to.arg(),
            rows,
            part.width,
            from_at,
            first_row,
            part.state_size,
            part.at,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn end_gradient_kernel(
    rows: &Array<u32>,
    lengths: &Array<u32>,
    d_features: &Array<f32>,
    d_out: &mut Array<f32>,
    places: usize,
    runs: usize,
    width: usize,
    at: usize,
    stride: usize,
) {
    if ABSOLUTE_POS < places * width {
        let (place, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let (t, run) = (place / runs, place % runs);
        // One more than the row whose final state is the run's end, 0 for none.
        let row = rows[run] as usize;
        let is_end = row > 0 && t + 1 == lengths[run] as usize;
        let from = select(is_end, (row - select(is_end, 1, 0)) * stride + at + column, 0);
        d_out[ABSOLUTE_POS] = select(is_end, d_features[from], 0.0);
    }
}

/// The gradient of a direction's output where only the final state is read: `[T][Nr][width]`, zero but at the last step of
/// the runs whose end a row's final state is. `rows` `[Nr]` has that row plus one, or 0.
#[allow(clippy::too_many_arguments)]
pub fn end_gradients<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    rows: &Buffer,
    lengths: &Buffer,
    d_features: &Buffer,
    (at, stride): (usize, usize),
    width: usize,
    d_out: &Buffer,
) {
    // SAFETY: one element for each unit; rows lie inside the features.
    unsafe {
        end_gradient_kernel::launch_unchecked::<R>(
            client,
            cubes(extent.places() * width),
            CubeDim::new_1d(UNITS),
            rows.arg(),
            lengths.arg(),
            d_features.arg(),
            d_out.arg(),
            extent.places(),
            extent.runs,
            width,
            at,
            stride,
        );
    }
}
