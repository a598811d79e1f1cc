//! The output of a layer: h of its directions side by side in the order of the steps, behind dropout, and its gradient.

use cubecl::prelude::*;

use super::buffer::{Buffer, UNITS, cubes};
use super::rows::{Extent, turned};

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
    from: &Array<f32>,
    to: &mut Array<f32>,
    places: usize,
    runs: usize,
    size: usize,
    width: usize,
    at: usize,
    scale: f32,
    #[comptime] direction: u32,
    #[comptime] drops: bool,
    #[comptime] is_gradient: bool,
) {
    if ABSOLUTE_POS < places * size {
        let (place, unit) = (ABSOLUTE_POS / size, ABSOLUTE_POS % size);
        let (t, run) = (place / runs, place % runs);
        // The step of this place in the other order.
        let other = RuntimeCell::<usize>::new(t);
        if comptime!(direction == 1) {
            other.store(turned(t, lengths[run] as usize));
        }
        let (source, target, step) = if comptime!(is_gradient) {
            ((other.read() * runs + run) * width + at + unit, ABSOLUTE_POS, other.read())
        } else {
            // The first of h's T + 1 is the start.
            (((other.read() + 1) * runs + run) * size + unit, place * width + at + unit, t)
        };
        let value = from[source];
        if comptime!(drops) {
            to[target] = kept(value, numbers, slots, first_steps, scale, step, run, direction, unit as u32);
        } else {
            to[target] = value;
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
    launch(client, extent, part, runs, dropout, h, out, false);
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
    launch(client, extent, part, runs, dropout, d_out, d_h, true);
}

#[allow(clippy::too_many_arguments)]
fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    part: OutputPart,
    runs: RunTables<'_>,
    dropout: Option<&Dropout>,
    from: &Buffer,
    to: &Buffer,
    is_gradient: bool,
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
            from.arg(),
            to.arg(),
            extent.places(),
            extent.runs,
            part.size,
            part.width,
            part.direction * part.size,
            scale,
            part.direction as u32,
            dropout.is_some(),
            is_gradient,
        );
    }
}

fn numbers_of<R: Runtime>(client: &ComputeClient<R>, dropout: Option<&Dropout>) -> (Buffer, f32) {
    let Some(dropout) = dropout else { return (Buffer::new(client, 6), 1.0) };
    let Dropout { key: [key0, key1], step, threshold, scale, step_stride, position } = *dropout;
    (Buffer::from_words(client, &[key0, key1, step, threshold, step_stride, position]), scale)
}
