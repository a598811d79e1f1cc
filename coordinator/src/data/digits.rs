//! The embedded digits: 28 x 28 images drawn when they are opened, so that the task `rows` needs no file.
//!
//! Each digit has a few ways of being written. A way is a list of strokes through control points in the unit
//! square, y downwards. A drawing jitters the control points, bends and distorts the whole, and inks every pixel by
//! its distance to the strokes. The numbers come from counter-based streams and from f32 arithmetic with
//! + - * / and square root, sine and cosine of libm: every machine draws the same bytes.

use protocol::random::{Purpose, Stream};

use super::images::ImageSet;

/// Counts the changes of the drawing: a run on embedded data is only repeatable while it stays.
pub(super) const EMBEDDED_DIGITS_VERSION: u32 = 1;

/// sha256 of what is drawn: pixels and labels of the training images, then of the test images.
pub(super) const EMBEDDED_DIGITS_SHA256: &str =
    "eefdf199e1dfa8ae153d6684a1f9855c0e391ba1970fe33a65a1492300b7cb91";

pub(super) const TRAIN_SAMPLES: u32 = 12_000;
pub(super) const TEST_SAMPLES: u32 = 2_000;

/// Height and width of an image.
const SIZE: usize = 28;

/// The digits do not depend on a job's seed.
const SEED: u64 = 0x6469_6769_7473;

/// The training images.
pub(super) fn train() -> ImageSet {
    draw_set(0, TRAIN_SAMPLES)
}

/// The test images, drawn from other streams.
pub(super) fn test() -> ImageSet {
    draw_set(1, TEST_SAMPLES)
}

/// Image `i` shows digit `i mod 10`.
fn draw_set(set: u32, samples: u32) -> ImageSet {
    let labels: Vec<u8> = (0..samples).map(|sample| (sample % 10) as u8).collect();
    let mut pixels = Vec::with_capacity(labels.len() * SIZE * SIZE);
    for (sample, &label) in labels.iter().enumerate() {
        let mut random = Stream::new(SEED, Purpose::Digits, [set, sample as u32]);
        pixels.extend(draw(label, &mut random));
    }
    ImageSet { rows: SIZE, cols: SIZE, pixels, labels }
}

/// A point: x to the right, y downwards.
type Point = [f32; 2];

/// A part of a digit that is written without a change of manner.
enum Stroke {
    /// Straight from point to point.
    Lines(&'static [Point]),
    /// Smoothly through the points.
    Curve(&'static [Point]),
    /// Smoothly through the points and back to the first.
    Loop(&'static [Point]),
}

use Stroke::{Curve, Lines, Loop};

/// The ways of writing each digit.
#[rustfmt::skip]
const WAYS: [&[&[Stroke]]; 10] = [
    &[
        &[Loop(&[[0.50, 0.04], [0.76, 0.18], [0.83, 0.50], [0.75, 0.82], [0.50, 0.96], [0.25, 0.82], [0.17, 0.50], [0.24, 0.18]])],
        &[Curve(&[[0.62, 0.08], [0.36, 0.10], [0.20, 0.40], [0.24, 0.76], [0.48, 0.95], [0.74, 0.80], [0.80, 0.42], [0.66, 0.14], [0.46, 0.06]])],
        &[Loop(&[[0.52, 0.05], [0.68, 0.25], [0.70, 0.60], [0.55, 0.94], [0.38, 0.85], [0.31, 0.50], [0.36, 0.18]])],
    ],
    &[
        &[Lines(&[[0.50, 0.04], [0.50, 0.96]])],
        &[Lines(&[[0.32, 0.24], [0.54, 0.05], [0.54, 0.96]])],
        &[Lines(&[[0.34, 0.22], [0.52, 0.06], [0.52, 0.94]]), Lines(&[[0.30, 0.94], [0.74, 0.94]])],
    ],
    &[
        &[Curve(&[[0.20, 0.28], [0.30, 0.10], [0.52, 0.04], [0.75, 0.15], [0.76, 0.36], [0.58, 0.60], [0.36, 0.79], [0.18, 0.94]]),
          Lines(&[[0.18, 0.94], [0.84, 0.93]])],
        &[Curve(&[[0.22, 0.22], [0.44, 0.05], [0.70, 0.13], [0.72, 0.36], [0.52, 0.66], [0.30, 0.90], [0.17, 0.88], [0.26, 0.75],
                  [0.46, 0.82], [0.64, 0.94], [0.86, 0.85]])],
        &[Curve(&[[0.18, 0.16], [0.45, 0.05], [0.72, 0.16], [0.70, 0.42], [0.46, 0.70], [0.22, 0.92], [0.50, 0.90], [0.82, 0.93]])],
    ],
    &[
        &[Curve(&[[0.22, 0.15], [0.46, 0.04], [0.72, 0.13], [0.70, 0.34], [0.44, 0.47]]),
          Curve(&[[0.44, 0.47], [0.74, 0.56], [0.79, 0.78], [0.52, 0.95], [0.20, 0.86]])],
        &[Lines(&[[0.22, 0.07], [0.76, 0.07], [0.46, 0.42]]), Curve(&[[0.46, 0.42], [0.74, 0.50], [0.80, 0.74], [0.55, 0.95], [0.20, 0.87]])],
        &[Curve(&[[0.26, 0.12], [0.54, 0.05], [0.68, 0.22], [0.54, 0.42], [0.36, 0.47], [0.60, 0.50], [0.74, 0.70], [0.54, 0.94], [0.24, 0.90]])],
    ],
    &[
        &[Lines(&[[0.62, 0.05], [0.17, 0.63], [0.86, 0.62]]), Lines(&[[0.64, 0.36], [0.62, 0.96]])],
        &[Lines(&[[0.24, 0.06], [0.20, 0.50], [0.80, 0.50]]), Lines(&[[0.74, 0.06], [0.70, 0.96]])],
        &[Lines(&[[0.66, 0.96], [0.66, 0.05], [0.16, 0.66], [0.88, 0.66]])],
        &[Curve(&[[0.26, 0.08], [0.20, 0.34], [0.34, 0.52], [0.60, 0.48], [0.74, 0.36]]), Lines(&[[0.76, 0.08], [0.68, 0.96]])],
    ],
    &[
        &[Lines(&[[0.76, 0.06], [0.30, 0.06], [0.26, 0.44]]), Curve(&[[0.26, 0.44], [0.50, 0.36], [0.77, 0.52], [0.77, 0.78], [0.50, 0.95], [0.20, 0.86]])],
        &[Curve(&[[0.78, 0.08], [0.48, 0.07], [0.28, 0.22], [0.40, 0.42], [0.68, 0.56], [0.72, 0.80], [0.46, 0.95], [0.20, 0.86]])],
        &[Lines(&[[0.30, 0.08], [0.28, 0.42]]), Curve(&[[0.28, 0.42], [0.56, 0.38], [0.76, 0.60], [0.66, 0.88], [0.38, 0.95], [0.20, 0.84]]),
          Lines(&[[0.30, 0.08], [0.80, 0.05]])],
    ],
    &[
        &[Curve(&[[0.68, 0.06], [0.40, 0.22], [0.23, 0.52], [0.25, 0.80], [0.50, 0.95], [0.75, 0.82], [0.74, 0.62], [0.52, 0.52], [0.30, 0.64], [0.26, 0.78]])],
        &[Curve(&[[0.50, 0.04], [0.32, 0.34], [0.24, 0.66], [0.36, 0.90], [0.60, 0.93], [0.72, 0.76], [0.58, 0.62], [0.36, 0.68], [0.28, 0.80]])],
        &[Curve(&[[0.76, 0.10], [0.48, 0.08], [0.26, 0.36], [0.22, 0.70], [0.42, 0.94], [0.70, 0.88], [0.78, 0.66], [0.58, 0.50], [0.32, 0.58], [0.24, 0.70]])],
    ],
    &[
        &[Lines(&[[0.18, 0.08], [0.82, 0.08], [0.42, 0.96]])],
        &[Lines(&[[0.20, 0.08], [0.80, 0.08], [0.46, 0.96]]), Lines(&[[0.34, 0.52], [0.80, 0.50]])],
        &[Lines(&[[0.18, 0.22], [0.20, 0.07]]), Curve(&[[0.20, 0.07], [0.50, 0.11], [0.82, 0.07], [0.60, 0.42], [0.48, 0.96]])],
    ],
    &[
        &[Loop(&[[0.74, 0.16], [0.50, 0.04], [0.27, 0.16], [0.31, 0.36], [0.52, 0.48], [0.74, 0.62], [0.77, 0.82], [0.50, 0.96],
                 [0.23, 0.82], [0.28, 0.62], [0.50, 0.47], [0.70, 0.34]])],
        &[Loop(&[[0.50, 0.05], [0.70, 0.15], [0.68, 0.35], [0.50, 0.46], [0.32, 0.35], [0.30, 0.15]]),
          Loop(&[[0.50, 0.46], [0.74, 0.58], [0.76, 0.82], [0.50, 0.96], [0.24, 0.82], [0.26, 0.58]])],
        &[Curve(&[[0.76, 0.08], [0.46, 0.05], [0.28, 0.20], [0.44, 0.42], [0.68, 0.66], [0.62, 0.92], [0.38, 0.94], [0.30, 0.72], [0.50, 0.44], [0.78, 0.10]])],
    ],
    &[
        &[Curve(&[[0.74, 0.22], [0.52, 0.05], [0.27, 0.18], [0.27, 0.38], [0.48, 0.49], [0.70, 0.38], [0.75, 0.16]]), Lines(&[[0.75, 0.18], [0.67, 0.96]])],
        &[Curve(&[[0.72, 0.24], [0.52, 0.06], [0.28, 0.18], [0.28, 0.40], [0.50, 0.48], [0.70, 0.34], [0.74, 0.20], [0.76, 0.60], [0.60, 0.92], [0.30, 0.90]])],
        &[Loop(&[[0.52, 0.05], [0.74, 0.18], [0.70, 0.40], [0.48, 0.48], [0.28, 0.36], [0.30, 0.14]]), Curve(&[[0.72, 0.30], [0.68, 0.64], [0.50, 0.96]])],
    ],
];

/// Straight pieces that stand for the curve between two control points.
const PIECES: usize = 5;

/// One image of `digit`.
fn draw(digit: u8, random: &mut Stream) -> [u8; SIZE * SIZE] {
    let ways = WAYS[usize::from(digit)];
    let way = ways[random.below(ways.len() as u32) as usize];
    let hand = Hand::new(random);
    let mut canvas = Canvas::new();
    for stroke in way {
        let (points, smooth, closed) = match *stroke {
            Lines(points) => (points, false, false),
            Curve(points) => (points, true, false),
            Loop(points) => (points, true, true),
        };
        let placed: Vec<Point> = points.iter().map(|&point| hand.place(jitter(point, random))).collect();
        let path = if smooth { smoothed(&placed, closed) } else { placed };
        for ends in path.windows(2) {
            canvas.line(ends[0], ends[1], hand.radius);
        }
    }
    canvas.inked(&hand, random)
}

/// A number uniform in [low, high).
fn between(random: &mut Stream, low: f32, high: f32) -> f32 {
    low + (high - low) * random.unit_f32()
}

/// Moves a control point a little.
fn jitter([x, y]: Point, random: &mut Stream) -> Point {
    [x + between(random, -0.05, 0.05), y + between(random, -0.05, 0.05)]
}

/// How one image is written: a map from the unit square to pixels, and a pen.
struct Hand {
    /// Pixels per unit, across and down.
    scale: Point,
    /// How far the top leans to the right.
    shear: f32,
    /// Sine and cosine of the rotation.
    turn: Point,
    /// Where the middle of the unit square lies, in pixels.
    middle: Point,
    /// Height of the bend that is laid over the vertical, and where it starts.
    bend: f32,
    bend_phase: f32,
    /// Half the width of the strokes in pixels.
    radius: f32,
    /// Darkness of the strokes, at most 1.
    ink: f32,
    /// Largest change of a pixel by noise, of 1.
    noise: f32,
}

impl Hand {
    fn new(random: &mut Stream) -> Self {
        let size = between(random, 17.0, 22.5);
        let width = between(random, 0.65, 1.1);
        let angle = between(random, -0.22, 0.22);
        let centre = SIZE as f32 / 2.0;
        Self {
            scale: [size * width, size],
            shear: between(random, -0.12, 0.38),
            turn: [libm::sinf(angle), libm::cosf(angle)],
            middle: [centre + between(random, -2.5, 2.5), centre + between(random, -2.0, 2.0)],
            bend: between(random, -0.06, 0.06),
            bend_phase: between(random, 0.0, 6.0),
            radius: between(random, 0.7, 1.7),
            ink: between(random, 0.75, 1.0),
            noise: between(random, 0.0, 0.12),
        }
    }

    /// From the unit square to pixels.
    fn place(&self, [x, y]: Point) -> Point {
        let bend = self.bend * libm::sinf(4.0 * y + self.bend_phase);
        let x = (x - 0.5 + bend + self.shear * (0.5 - y)) * self.scale[0];
        let y = (y - 0.5) * self.scale[1];
        let [sine, cosine] = self.turn;
        [self.middle[0] + x * cosine - y * sine, self.middle[1] + x * sine + y * cosine]
    }
}

/// The Catmull-Rom spline through the points, as the corners of short straight pieces.
fn smoothed(points: &[Point], closed: bool) -> Vec<Point> {
    let count = points.len();
    let spans = if closed { count } else { count - 1 };
    // Beyond an open end lies the end itself.
    let at = |index: usize| match closed {
        true => points[(index + count - 1) % count],
        false => points[index.saturating_sub(1).min(count - 1)],
    };
    let mut path = vec![points[0]];
    for span in 0..spans {
        let [before, from, to, after] = [0, 1, 2, 3].map(|offset| at(span + offset));
        for piece in 1..=PIECES {
            let t = piece as f32 / PIECES as f32;
            path.push([0, 1].map(|axis| {
                let (p0, p1, p2, p3) = (before[axis], from[axis], to[axis], after[axis]);
                let linear = p2 - p0;
                let square = 2.0 * p0 - 5.0 * p1 + 4.0 * p2 - p3;
                let cubic = 3.0 * (p1 - p2) + p3 - p0;
                p1 + 0.5 * t * (linear + t * (square + t * cubic))
            }));
        }
    }
    path
}

/// The squared distance of every pixel to the nearest stroke.
struct Canvas([f32; SIZE * SIZE]);

impl Canvas {
    fn new() -> Self {
        Self([f32::MAX; SIZE * SIZE])
    }

    /// Notes a straight line where it matters: no further than `radius` and the soft edge from it.
    fn line(&mut self, from: Point, to: Point, radius: f32) {
        let reach = radius + 1.0;
        let pixels = |axis: usize| {
            let low = (from[axis].min(to[axis]) - reach).max(0.0) as usize;
            let high = (from[axis].max(to[axis]) + reach).max(0.0) as usize;
            low.min(SIZE)..(high + 1).min(SIZE)
        };
        let [along_x, along_y] = [to[0] - from[0], to[1] - from[1]];
        let squared_len = along_x * along_x + along_y * along_y;
        for row in pixels(1) {
            for col in pixels(0) {
                // The middle of a pixel, seen from the start of the line.
                let [x, y] = [col as f32 + 0.5 - from[0], row as f32 + 0.5 - from[1]];
                let part = if squared_len > 0.0 { (x * along_x + y * along_y) / squared_len } else { 0.0 };
                let part = part.clamp(0.0, 1.0);
                let [dx, dy] = [x - part * along_x, y - part * along_y];
                let nearest = &mut self.0[row * SIZE + col];
                *nearest = nearest.min(dx * dx + dy * dy);
            }
        }
    }

    /// The pixels: full ink inside a stroke, fading over one pixel at its edge, with noise.
    fn inked(&self, hand: &Hand, random: &mut Stream) -> [u8; SIZE * SIZE] {
        self.0.map(|squared_distance| {
            let cover = (hand.radius + 0.5 - squared_distance.sqrt()).clamp(0.0, 1.0);
            let level = hand.ink * cover + hand.noise * between(random, -1.0, 1.0);
            (level.clamp(0.0, 1.0) * 255.0 + 0.5) as u8
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_digit_is_drawn_equally_often() {
        for (set, per_class) in [(train(), 1200), (test(), 200)] {
            for digit in 0..10 {
                assert_eq!(set.labels.iter().filter(|&&label| label == digit).count(), per_class);
            }
            assert_eq!(set.pixels.len(), set.labels.len() * SIZE * SIZE);
        }
    }

    #[test]
    fn every_way_of_writing_leaves_ink_and_stays_in_the_middle() {
        let set = test();
        for (sample, image) in set.pixels.chunks_exact(SIZE * SIZE).enumerate() {
            let dark = image.iter().filter(|&&pixel| pixel > 127).count();
            assert!((15..400).contains(&dark), "test image {sample} has {dark} dark pixels");
            let border = (0..SIZE).flat_map(|i| [i, (SIZE - 1) * SIZE + i, i * SIZE, i * SIZE + SIZE - 1]);
            let touching = border.filter(|&pixel| image[pixel] > 127).count();
            assert!(touching <= 8, "test image {sample} touches the border with {touching} pixels");
        }
    }

    #[test]
    fn a_spline_goes_through_its_points() {
        let points = [[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]];
        let open = smoothed(&points, false);
        assert_eq!(
            (open.len(), open[0], open[PIECES], open[2 * PIECES]),
            (11, points[0], points[1], points[2])
        );
        let closed = smoothed(&points, true);
        assert_eq!((closed.len(), closed[2 * PIECES], closed[3 * PIECES]), (16, points[2], points[0]));
    }
}
