//! A picture of the losses of a run. Pure: numbers in, the text of an SVG out, without a time or a fleet in it.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

use crate::data::grouped;
use crate::screen::short;

const SIZE: (u32, u32) = (960, 540);

const FONT: &str = "sans-serif";
const TRAINING: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const VALIDATION: RGBColor = RGBColor(0xd9, 0x4f, 0x00);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);
const GRID: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);

/// Markers would hide the line where there are more.
const MARKERS: usize = 50;

/// Highest over lowest value from which on a logarithmic axis shows more.
const LOGARITHMIC_FROM: f64 = 12.0;

/// This part of the training points is the usual one and always inside, and so is all validation.
const USUAL: f64 = 0.98;

/// Where the usual losses would take less of the height than this, what lies above them is cut off.
const USUAL_HEIGHT: f64 = 0.25;

/// What is drawn.
#[derive(Debug, Clone, Default)]
pub(crate) struct LossPlot<'a> {
    pub(crate) title: &'a str,
    /// The line below the title.
    pub(crate) caption: &'a str,
    /// Step and loss in nats, by step. What is not finite is left out.
    pub(crate) training: &'a [(f64, f64)],
    /// The same of the validation data.
    pub(crate) validation: &'a [(f64, f64)],
}

/// Draws a plot as the text of an SVG file.
pub(crate) fn loss_svg(plot: &LossPlot<'_>) -> String {
    let mut svg = String::new();
    draw(plot, &mut svg).expect("a string takes all that is written");
    svg
}

type DrawingError = DrawingAreaErrorKind<std::io::Error>;

fn draw(plot: &LossPlot<'_>, svg: &mut String) -> Result<(), DrawingError> {
    let (training, validation) = (finite(plot.training), finite(plot.validation));
    let scale = Scale::of(&training, &validation);
    let last_step = training.iter().chain(&validation).map(|point| point.0).fold(1.0, f64::max);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    heading(&root, plot.title, &caption(plot.caption, &scale))?;
    let steps = Axis { range: 0.0..last_step, ticks: ticks(0.0..last_step, 8, 1.0) };
    let losses = Axis { range: scale.range.clone(), ticks: scale.ticks.clone() };
    let mut chart = ChartBuilder::on(&root)
        .margin_top(74)
        .margin_right(28)
        .margin_bottom(10)
        .margin_left(14)
        .x_label_area_size(52)
        .y_label_area_size(66)
        .build_cartesian_2d(steps, losses)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc(if scale.is_logarithmic { "loss, nats (logarithmic)" } else { "loss, nats" })
        .x_label_formatter(&|step| grouped(*step as u64))
        .y_label_formatter(&|y| scale.label(*y))
        .label_style((FONT, 14).into_font().color(&INK))
        .axis_desc_style((FONT, 15).into_font().color(&INK))
        .axis_style(FAINT)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;

    let place = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|&(step, loss)| (step, scale.y(loss))).collect()
    };
    let (training, validation) = (place(&training), place(&validation));
    for (points, color) in [(&training, TRAINING), (&validation, VALIDATION)] {
        for part in below(points, scale.range.end) {
            chart.draw_series(LineSeries::new(part, color.stroke_width(2)))?;
        }
    }
    // A single point is no line.
    let lone = training.iter().filter(|_| training.len() == 1);
    let marked = validation.iter().filter(|_| validation.len() <= MARKERS);
    let inside = |point: &&(f64, f64)| point.1 <= scale.range.end;
    chart.draw_series(lone.filter(inside).map(|&point| Circle::new(point, 4, TRAINING.filled())))?;
    chart.draw_series(marked.filter(inside).map(|&point| Circle::new(point, 4, VALIDATION.filled())))?;
    legend(&root, !training.is_empty(), !validation.is_empty())?;
    root.present()
}

/// Title and caption, from the left edge of the axis on.
fn heading(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    caption: &str,
) -> Result<(), DrawingError> {
    root.draw(&Text::new(title.to_owned(), (80, 16), (FONT, 22).into_font().color(&INK)))?;
    root.draw(&Text::new(caption.to_owned(), (80, 46), (FONT, 15).into_font().color(&FAINT)))
}

/// In the upper right corner: losses fall.
fn legend(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    has_training: bool,
    has_validation: bool,
) -> Result<(), DrawingError> {
    let entries =
        [("training", TRAINING, has_training, false), ("validation", VALIDATION, has_validation, true)];
    let (left, top) = (SIZE.0 as i32 - 160, 92);
    for ((name, color, _, is_marked), row) in entries.into_iter().filter(|entry| entry.2).zip(0..) {
        let y = top + 22 * row;
        root.draw(&PathElement::new([(left, y), (left + 30, y)], color.stroke_width(2)))?;
        if is_marked {
            root.draw(&Circle::new((left + 15, y), 4, color.filled()))?;
        }
        root.draw(&Text::new(name, (left + 40, y - 9), (FONT, 15).into_font().color(&INK)))?;
    }
    Ok(())
}

/// The caption, and what the picture does not show.
fn caption(caption: &str, scale: &Scale) -> String {
    match scale.cut_off {
        Some(highest) => format!("{caption} · above the top: up to {}", short(highest)),
        None => caption.to_owned(),
    }
}

/// A straight axis with labels where they are wanted.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let part = (value - self.range.start) / (self.range.end - self.range.start);
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// How losses become heights.
#[derive(Debug, Clone, PartialEq)]
struct Scale {
    is_logarithmic: bool,
    /// Lowest and highest height.
    range: Range<f64>,
    /// Heights with a label.
    ticks: Vec<f64>,
    /// The highest loss, if it lies above the range.
    cut_off: Option<f64>,
}

impl Scale {
    fn of(training: &[(f64, f64)], validation: &[(f64, f64)]) -> Self {
        let losses = |points: &[(f64, f64)]| points.iter().map(|point| point.1).collect::<Vec<f64>>();
        let (mut training, validation) = (losses(training), losses(validation));
        training.sort_by(f64::total_cmp);
        let all = || training.iter().chain(&validation).copied();
        let Some(lowest) = all().reduce(f64::min) else {
            return Self { is_logarithmic: false, range: 0.0..1.0, ticks: vec![0.0, 1.0], cut_off: None };
        };
        let highest = all().reduce(f64::max).unwrap_or(lowest);
        let place = ((training.len() as f64 * USUAL).ceil() as usize).saturating_sub(1);
        let usual = training.get(place).copied().into_iter().chain(validation).fold(lowest, f64::max);
        let shows_factors = |top: f64| lowest > 0.0 && top / lowest > LOGARITHMIC_FROM;
        let height = |loss: f64| if shows_factors(highest) { (loss / lowest).ln() } else { loss - lowest };
        let is_cut = usual > lowest && height(usual) < USUAL_HEIGHT * height(highest);
        let top = if is_cut { usual } else { highest };
        let is_logarithmic = shows_factors(top);
        let mut scale =
            Self { is_logarithmic, range: 0.0..1.0, ticks: Vec::new(), cut_off: is_cut.then_some(highest) };
        let (bottom, top) = (scale.y(lowest), scale.y(top));
        // Equal values have no height of their own.
        let margin = if top > bottom { 0.05 * (top - bottom) } else { (0.1 * top.abs()).max(0.05) };
        scale.range = bottom - margin..top + margin;
        if !is_logarithmic && lowest >= 0.0 {
            scale.range.start = scale.range.start.max(0.0);
        }
        scale.ticks = if is_logarithmic {
            logarithmic_ticks(scale.range.clone())
        } else {
            ticks(scale.range.clone(), 10, 0.0)
        };
        scale
    }

    fn y(&self, loss: f64) -> f64 {
        if self.is_logarithmic { loss.log10() } else { loss }
    }

    fn loss(&self, y: f64) -> f64 {
        if self.is_logarithmic { 10_f64.powf(y) } else { y }
    }

    /// The loss at a tick; all labels of a straight scale have the same decimals.
    fn label(&self, y: f64) -> String {
        let distance = self.ticks.get(1).map_or(0.0, |second| second - self.ticks[0]);
        match distance {
            1e-6..1e5 if !self.is_logarithmic && y.abs() < 1e5 => {
                let decimals = (-(distance * 1.001).log10().floor()).max(0.0) as usize;
                format!("{y:.decimals$}")
            }
            _ => short(self.loss(y)),
        }
    }
}

/// About `count` round numbers in a range, 1, 2 or 5 times a power of ten apart, and at least `finest`.
fn ticks(range: Range<f64>, count: usize, finest: f64) -> Vec<f64> {
    let wanted = ((range.end - range.start) / count as f64).max(finest).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= wanted);
    let step = step.unwrap_or(10.0 * power).max(finest);
    let first = (range.start / step).ceil();
    (0..=2 * count).map(|i| (first + i as f64) * step).take_while(|tick| *tick <= range.end).collect()
}

/// Powers of ten in a range of decimal logarithms, and their double and fivefold where there are few.
fn logarithmic_ticks(range: Range<f64>) -> Vec<f64> {
    let decades = range.start.floor() as i32..=range.end.ceil() as i32;
    let of = |factors: &[f64], every: usize| -> Vec<f64> {
        decades
            .clone()
            .filter(|decade| decade.rem_euclid(every as i32) == 0)
            .flat_map(|decade| factors.iter().map(move |factor| f64::from(decade) + factor.log10()))
            .filter(|tick| range.contains(tick))
            .collect()
    };
    let fine = of(&[1.0, 2.0, 5.0], 1);
    if fine.len() <= 10 { fine } else { of(&[1.0], 1 + (range.end - range.start) as usize / 10) }
}

/// The parts of a line that lie below `top`; each begins and ends where the line crosses it.
fn below(points: &[(f64, f64)], top: f64) -> Vec<Vec<(f64, f64)>> {
    let mut parts: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut before: Option<(f64, f64)> = None;
    for &point in points {
        let was_inside = before.is_some_and(|before| before.1 <= top);
        let is_inside = point.1 <= top;
        let crossing = before.filter(|_| was_inside != is_inside).map(|before| {
            let part = (top - before.1) / (point.1 - before.1);
            (before.0 + part * (point.0 - before.0), top)
        });
        if is_inside && !was_inside {
            parts.push(Vec::new());
        }
        if let Some(part) = parts.last_mut() {
            part.extend(crossing);
            part.extend(is_inside.then_some(point));
        }
        before = Some(point);
    }
    parts
}

fn finite(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().copied().filter(|(step, loss)| step.is_finite() && loss.is_finite()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts of a picture, which must be well-formed and all inside.
    fn texts(plot: &LossPlot<'_>) -> Vec<String> {
        let svg = loss_svg(plot);
        let document = roxmltree::Document::parse(&svg).unwrap_or_else(|error| panic!("{error}\n{svg}"));
        for node in document.descendants() {
            for (name, most) in [("x", SIZE.0), ("cx", SIZE.0), ("y", SIZE.1), ("cy", SIZE.1)] {
                let Some(value) = node.attribute(name) else { continue };
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{name}=\"{value}\""));
                assert!((0.0..=f64::from(most)).contains(&value), "{name} is {value}\n{svg}");
            }
        }
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        texts.filter_map(|node| Some(node.text()?.trim().to_owned())).collect()
    }

    fn plot<'a>(training: &'a [(f64, f64)], validation: &'a [(f64, f64)]) -> LossPlot<'a> {
        LossPlot { title: "char-lstm: <2 × lstm> & 128", caption: "last epoch", training, validation }
    }

    fn falling(steps: u32) -> Vec<(f64, f64)> {
        (1..=steps).map(|step| (f64::from(step), 1.5 + 3.0 / f64::from(step).sqrt())).collect()
    }

    #[test]
    fn the_picture_names_itself_its_axes_and_its_lines() {
        let (training, validation) = (falling(400), [(200.0, 1.7), (400.0, 1.6)]);
        let texts = texts(&plot(&training, &validation));
        for wanted in [
            "char-lstm: <2 × lstm> & 128",
            "last epoch",
            "step",
            "loss, nats",
            "training",
            "validation",
            "400",
        ] {
            assert!(texts.iter().any(|text| text == wanted), "no '{wanted}' in {texts:?}");
        }
        let heights = ["1.5", "2.0", "2.5", "3.0", "3.5", "4.0", "4.5"];
        assert!(heights.iter().all(|height| texts.iter().any(|text| text == height)), "{texts:?}");
        let numbers = texts.iter().filter(|text| text.parse::<f64>().is_ok()).count();
        assert!((8..25).contains(&numbers), "{texts:?}");
    }

    #[test]
    fn equal_numbers_are_equal_files() {
        let training = falling(300);
        assert_eq!(loss_svg(&plot(&training, &[(300.0, 1.6)])), loss_svg(&plot(&training, &[(300.0, 1.6)])));
        assert_ne!(loss_svg(&plot(&training, &[(300.0, 1.6)])), loss_svg(&plot(&training, &[(300.0, 1.7)])));
    }

    #[test]
    fn any_numbers_can_be_drawn() {
        let nan = f64::NAN;
        type Points<'a> = &'a [(f64, f64)];
        let cases: [(Points<'_>, Points<'_>); 12] = [
            (&[], &[]),
            (&[(1.0, 2.5)], &[]),
            (&[(1.0, 2.5)], &[(1.0, 2.5)]),
            (&[], &[(10.0, 0.0)]),
            (&[(1.0, nan), (2.0, f64::INFINITY)], &[]),
            (&[(1.0, 3.0), (2.0, nan), (3.0, 2.0)], &[(3.0, nan)]),
            (&[(1.0, 0.0), (2.0, 0.0)], &[]),
            (&[(1.0, -1.0), (2.0, 5.0)], &[]),
            (&[(1.0, 1e300), (2.0, 1e-300)], &[(2.0, 1.0)]),
            (&[(1.0, f64::MAX), (2.0, 2.0), (3.0, 1.9)], &[(3.0, 2.0)]),
            (&[(1.0, f64::MIN_POSITIVE), (1e15, 1e-5)], &[]),
            (&[(1.0, 1.0), (2.0, 1.0 + 1e-15)], &[]),
        ];
        for (training, validation) in cases {
            let texts = texts(&plot(training, validation));
            assert!(texts.iter().any(|text| text == "step"), "{training:?}");
            let drawn = training.iter().any(|point| point.1.is_finite());
            assert_eq!(texts.iter().any(|text| text == "training"), drawn, "{training:?}");
        }
    }

    #[test]
    fn the_first_losses_do_not_flatten_the_rest() {
        let mut training = falling(500);
        (training[0].1, training[1].1) = (4000.0, 90.0);
        let scale = Scale::of(&training, &[(500.0, 1.6)]);
        assert!(!scale.is_logarithmic && scale.range.end < 4.0, "{scale:?}");
        assert_eq!(scale.cut_off, Some(4000.0));
        assert!(texts(&plot(&training, &[])).contains(&"last epoch · above the top: up to 4000".to_owned()));
        // What falls by a factor, as an accuracy near one does, gets an axis of factors.
        let training: Vec<(f64, f64)> =
            (0..500).map(|i| (f64::from(i), 2.3 * (-f64::from(i) / 100.0).exp() + 0.03)).collect();
        let scale = Scale::of(&training, &[]);
        assert!(scale.is_logarithmic && scale.cut_off.is_none(), "{scale:?}");
        let labels: Vec<String> = scale.ticks.iter().map(|tick| scale.label(*tick)).collect();
        assert_eq!(labels, ["0.05", "0.1", "0.2", "0.5", "1", "2"]);
    }

    #[test]
    fn validation_is_never_cut_off() {
        let training: Vec<(f64, f64)> = (1..100).map(|step| (f64::from(step), 0.01)).collect();
        let scale = Scale::of(&training, &[(50.0, 3.0), (99.0, 8.0)]);
        assert!(scale.cut_off.is_none() && scale.y(8.0) < scale.range.end, "{scale:?}");
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(0.0..17_000.0, 8, 1.0), [0.0, 5000.0, 10_000.0, 15_000.0]);
        assert_eq!(ticks(0.0..3.0, 8, 1.0), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(
            ticks(1.3..2.1, 4, 0.0).into_iter().map(short).collect::<Vec<_>>(),
            ["1.4", "1.6", "1.8", "2"]
        );
        assert_eq!(logarithmic_ticks(-20.0..20.0).len(), 8);
    }

    #[test]
    fn a_line_is_cut_where_it_crosses_the_top() {
        let points = [(0.0, 5.0), (1.0, 3.0), (2.0, 1.0), (3.0, 3.0), (4.0, 1.0)];
        assert_eq!(
            below(&points, 2.0),
            [vec![(1.5, 2.0), (2.0, 1.0), (2.5, 2.0)], vec![(3.5, 2.0), (4.0, 1.0)]]
        );
        assert_eq!(below(&points, 9.0), [points.to_vec()]);
        assert!(below(&points, 0.0).is_empty());
    }
}
