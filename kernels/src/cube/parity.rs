//! The recurrent kernels against those of the CPU and against the f64 oracle, on devices that are there everywhere: lavapipe,
//! and for what it is given as CUDA C++ the host's processor.

mod case;
mod cpu;
mod pairs;

use super::sequence::Limits;
use case::{Case, Data, Kind, Place, RowResult};
use cubecl::prelude::*;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use protocol::job::Precision;
use std::collections::BTreeMap;

/// Largest allowed `max|a - b| / max|b|` of a tensor.
const TOLERANCE: f64 = 1e-5;
/// A row of a case.
type ComputeRow = fn(&Case, &Data, usize) -> RowResult;
/// What a device is held against; with rounded operands the first only.
const REFERENCES: [(&str, ComputeRow); 2] = [("CPU", Case::on_cpu), ("oracle", Case::by_oracle)];
/// What lavapipe gives a cube.
const LAVAPIPE: Limits = Limits { threads: 1024, shared: 32 * 256, registers: 0, cubes: 1 };

fn client() -> ComputeClient<WgpuRuntime> {
    super::guard::abort_on_device_panic();
    WgpuRuntime::client(&WgpuDevice::Cpu)
}

/// Draws of a case's data. Of few rows none may be at a corner, and of thousands of cases some have one there.
const DRAWS: u64 = 4;

/// A reference's results.
struct Reference {
    name: &'static str,
    rows: Vec<RowResult>,
    /// Of each row, whether a value fell on other sides of a corner on the device and here.
    at_corner: Vec<bool>,
    /// Of each row, whether an operand was rounded otherwise.
    is_rounded_otherwise: Vec<bool>,
}

impl Reference {
    fn dropped(&self) -> usize {
        let either = self.at_corner.iter().zip(&self.is_rounded_otherwise);
        either.filter(|(at_corner, is_rounded_otherwise)| **at_corner || **is_rounded_otherwise).count()
    }

    /// `max|got - want| / max|want|` of a tensor, without rows that were rounded otherwise; of gradients without those at a
    /// corner.
    fn distance(&self, got: &[RowResult], tensor: &str) -> f64 {
        let (mut difference, mut scale) = (0.0f64, 1e-30f64);
        for (row, (got, want)) in got.iter().zip(&self.rows).enumerate() {
            if self.is_rounded_otherwise[row] || self.at_corner[row] && tensor.starts_with("d_") {
                continue;
            }
            assert_eq!(got[tensor].len(), want[tensor].len(), "{tensor}");
            for (got, want) in got[tensor].iter().zip(&want[tensor]) {
                let error = (got - want).abs();
                difference = if error.is_nan() { f64::INFINITY } else { difference.max(error) };
                scale = scale.max(want.abs());
            }
        }
        difference / scale
    }
}

/// The largest distance of each tensor from each reference.
type Distances = BTreeMap<(&'static str, &'static str), f64>;

/// Runs a case twice and holds it against the references.
fn check<R: Runtime>(client: &ComputeClient<R>, case: &Case) -> Distances {
    let rows: Vec<usize> = (0..case.rows).collect();
    let mut draws = (0..DRAWS).map(|draw| {
        let data = Data::new(case, draw);
        let got = case.run(client, &data, &rows);
        assert!(have_same_bits(&got, &case.run(client, &data, &rows)), "two runs of {case:?} differ");
        let references = if case.precision == Precision::F32 { &REFERENCES[..] } else { &REFERENCES[..1] };
        let references = references.iter().map(|(name, of)| {
            let rows: Vec<RowResult> = rows.iter().map(|row| of(case, &data, *row)).collect();
            let sides = || got.iter().zip(&rows);
            let at_corner = sides().map(|(got, want)| case.is_at_another_side(got, want)).collect();
            let is_rounded_otherwise =
                sides().map(|(got, want)| case.is_rounded_otherwise(got, want)).collect();
            Reference { name, rows, at_corner, is_rounded_otherwise }
        });
        let references: Vec<Reference> = references.collect();
        (got, references)
    });
    let is_usable = |references: &[Reference]| references.iter().all(|it| it.dropped() <= case.rows / 10);
    let usable = draws.find(|(_, references)| is_usable(references));
    let Some((got, references)) = usable else { panic!("{case:?}: rows at a corner in {DRAWS} draws") };
    let mut distances = Distances::new();
    for reference in references {
        let (name, dropped) = (reference.name, reference.dropped());
        assert!(got[0].keys().eq(reference.rows[0].keys()), "{case:?}: other tensors than the {name}");
        for tensor in got[0].keys() {
            let distance = reference.distance(&got, tensor);
            assert!(
                distance <= TOLERANCE,
                "{tensor} is off the {name} by {distance:.2e}, {dropped} rows at a corner: {case:?}"
            );
            distances.insert((tensor, name), distance);
        }
    }
    distances
}

fn have_same_bits(a: &[RowResult], b: &[RowResult]) -> bool {
    let same = |a: &[f64], b: &[f64]| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
    let same_row = |a: &RowResult, b: &RowResult| {
        a.len() == b.len() && a.iter().all(|(name, values)| same(values, &b[name]))
    };
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_row(a, b))
}

fn check_all<R: Runtime>(client: &ComputeClient<R>, cases: &[Case]) {
    let mut worst: BTreeMap<String, Distances> = BTreeMap::new();
    for case in cases {
        let worst = worst.entry(case.cell.to_string()).or_default();
        for (of, distance) in check(client, case) {
            let worst = worst.entry(of).or_default();
            *worst = worst.max(distance);
        }
    }
    for (cell, distances) in worst {
        for ((tensor, reference), distance) in distances {
            println!("{cell:5} {tensor:12} {reference:7} {distance:.2e}");
        }
    }
    println!("parity: {} cases of recurrent kernels, forward and backward", cases.len());
}

#[test]
fn every_pair_of_options_shapes_and_layouts_follows_the_cpu_and_the_oracle() {
    check_all(&client(), &pairs::pairwise());
}

#[test]
#[ignore = "takes long; scripts/parity-full runs it"]
fn the_full_cube_follows_the_cpu_and_the_oracle() {
    check_all(&client(), &pairs::full());
}

#[test]
fn with_operands_of_bf16_every_kind_of_cell_follows_the_cpu() {
    check_all(&client(), &rounded());
}

/// Every cell with every combination of its options, with operands of bf16; so small that hardly a row has one that falls on
/// the other side of the middle between two numbers of bf16.
fn rounded() -> Vec<Case> {
    let of_kind = |(at, kind): (usize, Kind)| {
        let is_projected = kind.1.projection.is_some();
        let place = if is_projected { Place::Split } else { Place::ALL[at % Place::ALL.len()] };
        Case { precision: Precision::Bf16, ..Case::new(kind, 33, 10, 3, place, (2, 17)) }
    };
    pairs::kinds().into_iter().enumerate().map(of_kind).collect()
}

/// Rows have the same bits whichever others share the launch, whatever the layout.
fn check_layouts<R: Runtime>(client: &ComputeClient<R>) {
    let limits = Limits::of(client);
    let mut compared = 0;
    for kind in pairs::kinds().into_iter().filter(pairs::has_all_or_none) {
        // A projection is not for a cube that runs the whole sequence.
        let (cell, options) = kind;
        let first = if options.projection.is_some() { Place::Split } else { Place::Global };
        let case = |place, tile| Case::new((cell, options), 17, 9, 5, place, tile);
        let data = Data::new(&case(first, (1, 17)), 0);
        let rows: Vec<usize> = (0..9).collect();
        let want = case(first, (1, 17)).run(client, &data, &rows);
        let tiles = [(2, 17), (3, 17), (4, 17), (2, 17), (3, 5)];
        for (place, tile) in Place::ALL.into_iter().zip(tiles) {
            let case = case(place, tile);
            if case.fits(limits) {
                assert!(have_same_bits(&case.run(client, &data, &rows), &want), "{case:?} has other bits");
                compared += 1;
            }
        }
        for group in [&[3][..], &[8, 0, 5], &[1, 2, 4, 6, 7, 0]] {
            let case = case(first, (1, 17));
            let expected: Vec<RowResult> = group.iter().map(|row| want[*row].clone()).collect();
            let got = case.run(client, &data, group);
            assert!(have_same_bits(&got, &expected), "{case:?} has other bits in the company of {group:?}");
            compared += 1;
        }
    }
    println!("parity: {compared} cases of layouts and company, all of the same bits");
}

#[test]
fn neither_company_nor_layout_is_seen_in_the_bits() {
    check_layouts(&client());
}

/// The CUDA C++ of the same kernels, run by the host's processor.
#[cfg(feature = "cuda")]
mod emulated {
    use super::*;
    use crate::cube::emulated::skips;
    use crate::cube::source::{Architecture, Launches, SourceDevice, SourceRuntime};

    fn client() -> ComputeClient<SourceRuntime> {
        crate::cube::guard::abort_on_device_panic();
        let launches = Launches::Emulated { order: 1 };
        SourceRuntime::client(&SourceDevice { architecture: Architecture::Sm90, launches })
    }

    #[test]
    fn every_pair_of_options_shapes_and_layouts_follows_the_cpu_and_the_oracle() {
        if !skips() {
            check_all(&client(), &pairs::pairwise());
        }
    }

    #[test]
    #[ignore = "takes long; scripts/parity-full runs it"]
    fn the_full_cube_follows_the_cpu_and_the_oracle() {
        check_all(&client(), &pairs::full());
    }

    #[test]
    fn with_operands_of_bf16_every_kind_of_cell_follows_the_cpu() {
        if !skips() {
            check_all(&client(), &rounded());
        }
    }

    #[test]
    fn neither_company_nor_layout_is_seen_in_the_bits() {
        if !skips() {
            check_layouts(&client());
        }
    }
}
