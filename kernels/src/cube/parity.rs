//! The recurrent kernels against the f64 oracle, on a device that is there everywhere: lavapipe.

mod case;
mod pairs;

use super::sequence::Limits;
use case::{Case, Data, Place, RowResult};
use cubecl::prelude::*;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use std::collections::BTreeMap;

type Client = ComputeClient<WgpuRuntime>;

/// Largest allowed `max|a - b| / max|b|` of a tensor.
const TOLERANCE: f64 = 1e-5;
/// What lavapipe gives a cube.
const LAVAPIPE: Limits = Limits { threads: 1024, shared: 32 * 256, registers: 0, cubes: 1 };

fn client() -> Client {
    super::guard::abort_on_device_panic();
    WgpuRuntime::client(&WgpuDevice::Cpu)
}

/// Draws of a case's data. Of few rows none may be at a corner, and of thousands of cases some have one there.
const DRAWS: u64 = 4;

/// Runs a case twice and holds it against the oracle. Returns the largest distance of each tensor.
fn check(client: &Client, case: &Case) -> BTreeMap<&'static str, f64> {
    let rows: Vec<usize> = (0..case.rows).collect();
    let mut draws = (0..DRAWS).map(|draw| {
        let data = Data::new(case, draw);
        let got = case.run(client, &data, &rows);
        assert!(have_same_bits(&got, &case.run(client, &data, &rows)), "two runs of {case:?} differ");
        let want: Vec<RowResult> = rows.iter().map(|row| case.oracle(&data, *row)).collect();
        let at_corner: Vec<bool> =
            got.iter().zip(&want).map(|(got, want)| case.is_at_another_side(got, want)).collect();
        (got, want, at_corner)
    });
    let count = |at_corner: &[bool]| at_corner.iter().filter(|is| **is).count();
    let usable = draws.find(|(_, _, at_corner)| count(at_corner) <= case.rows / 10);
    let Some((got, want, at_corner)) = usable else { panic!("{case:?}: rows at a corner in {DRAWS} draws") };
    let dropped = count(&at_corner);
    let mut distances = BTreeMap::new();
    for name in want[0].keys().copied() {
        let (mut difference, mut scale) = (0.0f64, 1e-30f64);
        for ((got, want), at_corner) in got.iter().zip(&want).zip(&at_corner) {
            if *at_corner && name.starts_with("d_") {
                continue;
            }
            assert_eq!(got[name].len(), want[name].len(), "{case:?}: {name}");
            for (got, want) in got[name].iter().zip(&want[name]) {
                let error = (got - want).abs();
                difference = if error.is_nan() { f64::INFINITY } else { difference.max(error) };
                scale = scale.max(want.abs());
            }
        }
        let distance = difference / scale;
        assert!(
            distance <= TOLERANCE,
            "{name} is off by {distance:.2e}, {dropped} rows at a corner: {case:?}"
        );
        distances.insert(name, distance);
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

fn check_all(cases: &[Case]) {
    let client = client();
    let mut worst: BTreeMap<(String, &'static str), f64> = BTreeMap::new();
    for case in cases {
        for (name, distance) in check(&client, case) {
            let worst = worst.entry((case.cell.to_string(), name)).or_default();
            *worst = worst.max(distance);
        }
    }
    for ((cell, name), distance) in worst {
        println!("{cell:5} {name:12} {distance:.2e}");
    }
    println!("parity: {} cases of recurrent kernels, forward and backward", cases.len());
}

#[test]
fn every_pair_of_options_shapes_and_layouts_follows_the_oracle() {
    check_all(&pairs::pairwise());
}

#[test]
#[ignore = "takes long; scripts/parity-full runs it"]
fn the_full_cube_follows_the_oracle() {
    check_all(&pairs::full());
}

/// Rows have the same bits whichever others share the launch, whatever the layout.
#[test]
fn neither_company_nor_layout_is_seen_in_the_bits() {
    let client = client();
    let mut compared = 0;
    for kind in pairs::kinds().into_iter().filter(pairs::has_all_or_none) {
        // A projection is not for a cube that runs the whole sequence.
        let (cell, options) = kind;
        let first = if options.projection.is_some() { Place::Split } else { Place::Global };
        let case = |place, tile| Case::new((cell, options), 17, 9, 5, place, tile);
        let data = Data::new(&case(first, (1, 17)), 0);
        let rows: Vec<usize> = (0..9).collect();
        let want = case(first, (1, 17)).run(&client, &data, &rows);
        let tiles = [(2, 17), (3, 17), (4, 17), (2, 17), (3, 5)];
        for (place, tile) in Place::ALL.into_iter().zip(tiles) {
            let case = case(place, tile);
            if case.fits(LAVAPIPE) {
                assert!(have_same_bits(&case.run(&client, &data, &rows), &want), "{case:?} has other bits");
                compared += 1;
            }
        }
        for group in [&[3][..], &[8, 0, 5], &[1, 2, 4, 6, 7, 0]] {
            let case = case(first, (1, 17));
            let expected: Vec<RowResult> = group.iter().map(|row| want[*row].clone()).collect();
            let got = case.run(&client, &data, group);
            assert!(have_same_bits(&got, &expected), "{case:?} has other bits in the company of {group:?}");
            compared += 1;
        }
    }
    println!("parity: {compared} cases of layouts and company, all of the same bits");
}
