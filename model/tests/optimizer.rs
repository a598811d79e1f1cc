//! The updates of the CPU device against the f64 oracle: both optimizers with their options, clipped and not.

use kernels::Simd;
use kernels::oracle::optimizer::{Adam, EpsilonPlacement, Sgd, adam, clip_by_global_norm, sgd};
use model::cpu::{CpuBackend, CpuDevice};
use model::device::{Backend, Device, Update};
use protocol::batch::DataShape;
use protocol::job::{JobFile, JobSpec};
use protocol::layout::{ModelShape, StateLayout};
use protocol::random::{Purpose, Stream};
use protocol::schedule::Schedule;

/// Longer than one task's part, and no multiple of anything.
const PARAMETERS: usize = 70_001;

/// What the summed gradients are divided by.
const WEIGHT: u64 = 12;

fn job(settings: &str) -> JobSpec {
    let settings: Vec<(String, String)> = settings
        .split_whitespace()
        .map(|setting| setting.split_once('=').unwrap())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    JobFile::resolve("char-lstm", None, &settings).unwrap().job
}

fn device(job: &JobSpec, threads: usize) -> CpuDevice {
    let model = ModelShape::of(job, 5, 5);
    let layout = StateLayout::new(model.clone(), job.batch_size as usize);
    let schedule = Schedule { steps_per_epoch: 9, evaluation_batches: 0, total_steps: 9 };
    let data = DataShape { model, seq_len: job.seq_len as usize, schedule };
    CpuBackend::new(Simd::detect(), threads).open(&layout, job, &data, false).unwrap()
}

/// Numbers of a size from 0 to `size`, of both signs.
fn numbers(name: u32, size: f32) -> Vec<f32> {
    let mut random = Stream::new(5, Purpose::Digits, [name, 0]);
    (0..PARAMETERS).map(|_| size * (2.0 * random.unit_f32() - 1.0)).collect()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// The largest difference, as a share of the largest number.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    let largest = want.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    let difference = got.iter().zip(want).map(|(&got, want)| (f64::from(got) - want).abs());
    difference.fold(0.0f64, f64::max) / largest.max(f64::MIN_POSITIVE)
}

/// Parameters and both moments.
type State<T> = [Vec<T>; 3];

/// Ten updates on the device, with learning rates that change.
fn updated(job: &JobSpec, threads: usize) -> State<f32> {
    let mut device = device(job, threads);
    let [mut parameters, mut first, mut second] = start();
    for step in 0..10 {
        let gradient = numbers(100 + step, 30.0);
        let update = Update::new(job, u64::from(step), WEIGHT, rate(step));
        let norm = device.mean_norm(&gradient, WEIGHT).unwrap();
        device.update(&update, norm, &gradient, &mut parameters, &mut first, &mut second).unwrap();
    }
    [parameters, first, second]
}

/// The same in f64.
fn expected(job: &JobSpec, placement: Option<EpsilonPlacement>) -> State<f64> {
    let [mut parameters, mut first, mut second] = start().map(|values| widen(&values));
    for step in 0..10 {
        let lr = rate(step);
        let mut mean: Vec<f64> =
            widen(&numbers(100 + step, 30.0)).iter().map(|g| g / WEIGHT as f64).collect();
        if job.clip == protocol::job::Clip::Global {
            assert!(clip_by_global_norm(&mut mean, job.clip_norm) > job.clip_norm, "it clips");
        }
        match placement {
            Some(placement) => {
                let options =
                    Adam { lr, beta1: job.beta1, beta2: job.beta2, epsilon: job.epsilon, placement };
                adam(options, u64::from(step) + 1, &mut parameters, &mean, &mut first, &mut second);
            }
            None => sgd(Sgd { lr, momentum: job.momentum }, &mut parameters, &mean, &mut first),
        }
    }
    [parameters, first, second]
}

fn start() -> State<f32> {
    [numbers(1, 1.0), vec![0.0; PARAMETERS], vec![0.0; PARAMETERS]]
}

fn rate(step: u32) -> f64 {
    0.05 / f64::from(step + 1)
}

#[test]
fn updates_equal_the_oracle() {
    let (after, before) = (EpsilonPlacement::AfterCorrection, EpsilonPlacement::BeforeCorrection);
    let cases = [
        ("clip=none epsilon=0.01", Some(after)),
        ("clip=none epsilon=0.01 epsilon_placement=before_correction", Some(before)),
        ("clip=global clip_norm=2 epsilon=0.001 beta1=0.5 beta2=0.9", Some(after)),
        ("clip=none optimizer=sgd", None),
        ("clip=none optimizer=sgd momentum=0.9", None),
        ("clip=global clip_norm=2 optimizer=sgd momentum=0.5", None),
    ];
    let mut different = Vec::new();
    for (settings, placement) in cases {
        let job = job(settings);
        let (got, want) = (updated(&job, 1), expected(&job, placement));
        let distances: Vec<f64> = got.iter().zip(&want).map(|(got, want)| distance(got, want)).collect();
        println!("{settings}: parameters and moments against f64 {distances:?}");
        assert!(distances.iter().all(|&distance| distance < 2e-6), "{settings}: {distances:?}");
        assert_eq!(updated(&job, 3), got, "{settings}: threads change no bit");
        assert_eq!(got[2].iter().all(|&number| number == 0.0), placement.is_none(), "{settings}");
        assert!(!different.contains(&got), "{settings} has the numbers of another case");
        different.push(got);
    }
}
