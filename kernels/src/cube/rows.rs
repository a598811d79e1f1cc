//! What lies between the layers: inputs into their places, starts and ends of runs, the turn of a direction that reads
//! backwards, dropout.
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
fn turned(t: usize, length: usize) -> usize {
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

/// A word of `philox4x32_10`, by its place among the four.
#[cube]
#[allow(clippy::too_many_arguments)]
fn philox(
    key0: u32,
    key1: u32,
    counter0: u32,
    counter1: u32,
    counter2: u32,
    counter3: u32,
    word: u32,
) -> u32 {
    let (k0, k1) = (RuntimeCell::<u32>::new(key0), RuntimeCell::<u32>::new(key1));
    let (c0, c1) = (RuntimeCell::<u32>::new(counter0), RuntimeCell::<u32>::new(counter1));
    let (c2, c3) = (RuntimeCell::<u32>::new(counter2), RuntimeCell::<u32>::new(counter3));
    for _ in 0..10u32 {
        let (p0, p1) = (c0.read() * 0xD251_1F53u32, c2.read() * 0xCD9E_8D57u32);
        let (high0, high1) = (u32::mul_hi(c0.read(), 0xD251_1F53u32), u32::mul_hi(c2.read(), 0xCD9E_8D57u32));
        let next0 = high1 ^ c1.read() ^ k0.read();
        let next2 = high0 ^ c3.read() ^ k1.read();
        c0.store(next0);
        c1.store(p1);
        c2.store(next2);
        c3.store(p0);
        k0.store(k0.read() + 0x9E37_79B9u32);
        k1.store(k1.read() + 0xBB67_AE85u32);
    }
    let low = select(word == 0u32, c0.read(), c1.read());
    let high = select(word == 2u32, c2.read(), c3.read());
    select(word < 2u32, low, high)
}

/// What the masks of a layer's output are drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Of the stream: [`protocol::random::key`].
    pub key: [u32; 2],
    /// Training step, modulo 2³².
    pub step: u32,
    /// Words below it are kept: [`protocol::random::keep_threshold`].
    pub threshold: u32,
    /// What kept numbers are multiplied with.
    pub scale: f32,
    /// `L·D`, the distance between steps' positions; 0 where all steps have one mask.
    pub step_stride: u32,
    /// `layer·D`.
    pub position: u32,
}

#[cube]
#[allow(clippy::too_many_arguments)]
fn kept(
    value: f32,
    numbers: &Array<u32>,
    slots: &Array<u32>,
    first_steps: &Array<u32>,
    scale: f32,
    t: usize,
    run: usize,
    direction: u32,
    unit: u32,
) -> f32 {
    // The step counts in the row, of which the run may be a later part.
    let step = t as u32 + first_steps[run];
    let position = numbers[5] + direction + step * numbers[4];
    let word = philox(numbers[0], numbers[1], numbers[2], slots[run], position, unit / 4u32, unit % 4u32);
    select(word < numbers[3], value * scale, 0.0)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn output_kernel(
    numbers: &Array<u32>,
    lengths: &Array<u32>,
    slots: &Array<u32>,
    first_steps: &Array<u32>,
    h: &Array<f32>,
    out: &mut Array<f32>,
    places: usize,
    runs: usize,
    size: usize,
    width: usize,
    at: usize,
    scale: f32,
    #[comptime] direction: u32,
    #[comptime] drops: bool,
) {
    if ABSOLUTE_POS < places * size {
        let (place, unit) = (ABSOLUTE_POS / size, ABSOLUTE_POS % size);
        let (t, run) = (place / runs, place % runs);
        let source = RuntimeCell::<usize>::new(t);
        if comptime!(direction == 1) {
            source.store(turned(t, lengths[run] as usize));
        }
        // The first of h's T + 1 is the start.
        let value = h[((source.read() + 1) * runs + run) * size + unit];
        if comptime!(drops) {
            out[place * width + at + unit] =
                kept(value, numbers, slots, first_steps, scale, t, run, direction, unit as u32);
        } else {
            out[place * width + at + unit] = value;
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn output_gradient_kernel(
    numbers: &Array<u32>,
    lengths: &Array<u32>,
    slots: &Array<u32>,
    first_steps: &Array<u32>,
    d_out: &Array<f32>,
    d_h: &mut Array<f32>,
    places: usize,
    runs: usize,
    size: usize,
    width: usize,
    at: usize,
    scale: f32,
    #[comptime] direction: u32,
    #[comptime] drops: bool,
) {
    if ABSOLUTE_POS < places * size {
        let (place, unit) = (ABSOLUTE_POS / size, ABSOLUTE_POS % size);
        let (t, run) = (place / runs, place % runs);
        let source = RuntimeCell::<usize>::new(t);
        if comptime!(direction == 1) {
            source.store(turned(t, lengths[run] as usize));
        }
        let value = d_out[(source.read() * runs + run) * width + at + unit];
        if comptime!(drops) {
            d_h[ABSOLUTE_POS] =
                kept(value, numbers, slots, first_steps, scale, source.read(), run, direction, unit as u32);
        } else {
            d_h[ABSOLUTE_POS] = value;
        }
    }
}

/// The runs as masks see them.
#[derive(Debug, Clone, Copy)]
pub struct RunTables<'a> {
    /// Steps of each, `[Nr]`.
    pub lengths: &'a Buffer,
    /// Slot of the row of each, `[Nr]`.
    pub slots: &'a Buffer,
    /// Steps of the row before each, `[Nr]`.
    pub first_steps: &'a Buffer,
}

/// One direction's part of a layer's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputPart {
    /// 0, or 1 for the one that reads backwards.
    pub direction: usize,
    /// Width of each direction's output, `R`.
    pub size: usize,
    /// Width of the layer's output, `D·R`.
    pub width: usize,
}

/// Writes a direction's h `[T + 1][Nr][R]` to its columns of the layer's output `[T][Nr][D·R]`, in the order of the steps,
/// behind its dropout.
pub fn output<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    part: OutputPart,
    runs: RunTables<'_>,
    dropout: Option<&Dropout>,
    h: &Buffer,
    out: &Buffer,
) {
    let (numbers, scale) = numbers_of(client, dropout);
    // SAFETY: one element for each unit; places lie inside both buffers.
    unsafe {
        output_kernel::launch_unchecked::<R>(
            client,
            cubes(extent.places() * part.size),
            CubeDim::new_1d(UNITS),
            numbers.arg(),
            runs.lengths.arg(),
            runs.slots.arg(),
            runs.first_steps.arg(),
            h.arg(),
            out.arg(),
            extent.places(),
            extent.runs,
            part.size,
            part.width,
            part.direction * part.size,
            scale,
            part.direction as u32,
            dropout.is_some(),
        );
    }
}

/// The gradient of a direction's h `[T][Nr][R]`, in its own order of steps, from that of the layer's output behind its
/// dropout `[T][Nr][D·R]`.
pub fn output_gradient<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    part: OutputPart,
    runs: RunTables<'_>,
    dropout: Option<&Dropout>,
    d_out: &Buffer,
    d_h: &Buffer,
) {
    let (numbers, scale) = numbers_of(client, dropout);
    // SAFETY: one element for each unit; places lie inside both buffers.
    unsafe {
        output_gradient_kernel::launch_unchecked::<R>(
            client,
            cubes(extent.places() * part.size),
            CubeDim::new_1d(UNITS),
            numbers.arg(),
            runs.lengths.arg(),
            runs.slots.arg(),
            runs.first_steps.arg(),
            d_out.arg(),
            d_h.arg(),
            extent.places(),
            extent.runs,
            part.size,
            part.width,
            part.direction * part.size,
            scale,
            part.direction as u32,
            dropout.is_some(),
        );
    }
}

fn numbers_of<R: Runtime>(client: &ComputeClient<R>, dropout: Option<&Dropout>) -> (Buffer, f32) {
    let Some(dropout) = dropout else { return (Buffer::new(client, 6), 1.0) };
    let Dropout { key: [key0, key1], step, threshold, scale, step_stride, position } = *dropout;
    (Buffer::from_words(client, &[key0, key1, step, threshold, step_stride, position]), scale)
}
