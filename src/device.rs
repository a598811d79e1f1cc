//! `--device`: which device computes, and the one place that makes a backend of it.

use clap::Args;
use coordinator::store::state::StateImage;
use kernels::Simd;
use kernels::cpu::simd::SimdLevel;
use model::cpu::CpuBackend;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use model::cube::CubeBackend;
use model::device::{Backend, Device, DeviceError};
use protocol::batch::DataShape;
use protocol::job::{JobSpec, Precision};
use protocol::problem::Problem;
use protocol::schedule::Schedule;

/// Numbers the workers of one machine from 0; `train` sets it for its workers.
pub(crate) const LOCAL_RANK: &str = "LOCKSTEP_LOCAL_RANK";

/// Where the number of this process among those of its machine is looked for.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
const LOCAL_RANKS: [&str; 2] = [LOCAL_RANK, "SLURM_LOCALID"];

/// Which device computes.
#[derive(Debug, Clone, Args)]
pub(crate) struct DeviceArg {
    /// What computes: auto, cpu, cuda, cuda:N, wgpu or wgpu:N; without N each worker of a machine takes the next one
    /// [auto: cuda if this build has it and it works here, else cpu]
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// What is there.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU through CUDA.
    Cuda(Option<usize>),
    /// Anything through Vulkan.
    Wgpu(Option<usize>),
}

/// A device that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The CPU.
    Cpu,
    /// A CUDA device by its number, and the word for its bits.
    #[cfg(feature = "cuda")]
    Cuda(usize, &'static str),
    /// A device of wgpu's by its number.
    #[cfg(feature = "wgpu")]
    Wgpu(usize),
}

/// Something to be done with a backend, whichever it is.
pub(crate) trait WithBackend {
    /// What comes out of it.
    type Output;

    /// Does it.
    fn with<B>(self, backend: B) -> Self::Output
    where
        B: Backend + 'static,
        B::Device: 'static;
}

impl DeviceArg {
    /// The device that was asked for, if it is there.
    pub(crate) fn resolve(&self) -> Result<Chosen, Problem> {
        match wanted(&self.device)? {
            Wanted::Auto => Ok(cuda(&self.device, None).unwrap_or(Chosen::Cpu)),
            Wanted::Cpu => Ok(Chosen::Cpu),
            Wanted::Cuda(number) => cuda(&self.device, number),
            Wanted::Wgpu(number) => wgpu(&self.device, number),
        }
    }

    /// The same option as a word of a command line.
    pub(crate) fn to_word(&self) -> String {
        format!("--device={}", self.device)
    }
}

impl Chosen {
    /// Whether it can compute the job.
    pub(crate) fn check(self, job: &JobSpec) -> Result<(), Problem> {
        if self == Self::Cpu && job.precision == Precision::Tf32 {
            return Err(Problem::usage("precision is tf32, which only GPUs have")
                .hint("give --device cuda or wgpu, or --set precision=f32 or bf16"));
        }
        #[cfg(feature = "cuda")]
        if matches!(self, Self::Cuda(..)) && job.precision != Precision::F32 {
            kernels::cuda::tensor_headers().map_err(|missing| {
                let sentence = format!("precision is {}: {missing}", job.precision);
                Problem::usage(sentence).hint(missing.hint())
            })?;
        }
        Ok(())
    }

    /// What a user would want to know of the job on this device, where nothing is wrong.
    pub(crate) fn remark(self, job: &JobSpec, simd: Simd) -> Option<&'static str> {
        let is_slow = self == Self::Cpu && job.precision == Precision::Bf16 && simd.level() != SimdLevel::Amx;
        is_slow.then_some(
            "note: precision is bf16, which this CPU multiplies more slowly than f32: it has no AMX",
        )
    }

    /// Does something on this device. `threads` is how many compute where the CPU does.
    pub(crate) fn run<W: WithBackend>(self, simd: Simd, threads: usize, work: W) -> W::Output {
        match self {
            Self::Cpu => work.with(CpuBackend::new(simd, threads)),
            #[cfg(feature = "cuda")]
            Self::Cuda(number, name) => work.with(CubeBackend::cuda(number, name.to_owned())),
            #[cfg(feature = "wgpu")]
            Self::Wgpu(number) => work.with(CubeBackend::wgpu(&kernels::cube::vulkan::devices()[number])),
        }
    }
}

/// Opens a device for a trained network that reads rows of up to `seq_len` steps, and puts its parameters there. A device
/// without the precision in which it was trained reads in f32.
pub(crate) fn open<B: Backend>(
    backend: &B,
    job: &JobSpec,
    image: &StateImage,
    seq_len: usize,
) -> Result<(B::Device, <B::Device as Device>::Buffer), DeviceError> {
    let precision = if backend.has(job.precision) { job.precision } else { Precision::F32 };
    let (mut job, mut layout) = (job.clone(), image.layout().clone());
    (job.precision, layout.shape.precision) = (precision, precision);
    let schedule = Schedule { steps_per_epoch: 1, evaluation_batches: 0, total_steps: 0 };
    let data = DataShape { model: layout.shape.clone(), seq_len, schedule };
    let device = backend.open(&layout, &job, &data, false)?;
    let values = image.parameters();
    let mut parameters = device.zeros(values.len())?;
    device.import(&mut parameters, 0, &values)?;
    Ok((device, parameters))
}

/// What a word means.
pub(crate) fn wanted(word: &str) -> Result<Wanted, Problem> {
    let unknown = || {
        Problem::usage(format!(
            "--device: unknown device '{word}', expected auto, cpu, cuda, cuda:N, wgpu or wgpu:N"
        ))
    };
    let (kind, number) = match word.split_once(':') {
        None => (word, None),
        Some((kind, number)) if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => {
            (kind, Some(number.parse().map_err(|_| unknown())?))
        }
        Some(_) => return Err(unknown()),
    };
    match (kind, number) {
        ("auto", None) => Ok(Wanted::Auto),
        ("cpu", None) => Ok(Wanted::Cpu),
        ("cuda", number) => Ok(Wanted::Cuda(number)),
        ("wgpu", number) => Ok(Wanted::Wgpu(number)),
        _ => Err(unknown()),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(word: &str, _: Option<usize>) -> Result<Chosen, Problem> {
    Err(not_built(word, "cuda"))
}

#[cfg(feature = "cuda")]
fn cuda(word: &str, number: Option<usize>) -> Result<Chosen, Problem> {
    let cuda = kernels::cuda::Cuda::look()
        .map_err(|missing| Problem::usage(format!("--device {word}: {missing}")).hint(missing.hint()))?;
    let number = ordinal(word, number, cuda.devices.len())?;
    // Once in a process, which has one device.
    Ok(Chosen::Cuda(number, cuda.bits(number).leak()))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(word: &str, _: Option<usize>) -> Result<Chosen, Problem> {
    Err(not_built(word, "wgpu"))
}

#[cfg(feature = "wgpu")]
fn wgpu(word: &str, number: Option<usize>) -> Result<Chosen, Problem> {
    let devices = kernels::cube::vulkan::devices();
    if devices.is_empty() {
        return Err(Problem::usage(format!("--device {word}: there is no device that wgpu could use"))
            .hint("install a Vulkan driver, such as mesa-vulkan-drivers for the CPU"));
    }
    Ok(Chosen::Wgpu(ordinal(word, number, devices.len())?))
}

#[cfg(not(all(feature = "cuda", feature = "wgpu")))]
pub(crate) fn not_built(word: &str, feature: &str) -> Problem {
    Problem::usage(format!("--device {word}: this build has no {feature}"))
        .hint(format!("build it with cargo build --release --features {feature}"))
}

/// Which of so many devices of one kind.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
pub(crate) fn ordinal(word: &str, number: Option<usize>, count: usize) -> Result<usize, Problem> {
    match number {
        Some(number) if number < count => Ok(number),
        Some(_) => Err(Problem::usage(format!(
            "--device {word}: there {}",
            match count {
                1 => "is 1 such device, number 0".to_owned(),
                _ => format!("are {count} such devices, 0 to {}", count - 1),
            }
        ))
        .hint("see lockstep doctor")),
        None => Ok(local_rank(|name| std::env::var(name).ok())? % count),
    }
}

/// The number of this process among those of its machine; 0 where nobody says.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
fn local_rank(variable: impl Fn(&str) -> Option<String>) -> Result<usize, Problem> {
    let said = LOCAL_RANKS.iter().find_map(|name| Some((name, variable(name)?)));
    said.map_or(Ok(0), |(name, text)| {
        text.parse().map_err(|_| {
            Problem::usage(format!("{name} is '{text}', expected a number")).hint(
                "it numbers the workers of this machine from 0; or name a device, as in --device cuda:0",
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::job::JobFile;
    use protocol::layout::{ModelShape, StateLayout};

    #[test]
    fn devices_have_these_names() {
        for (word, meaning) in [
            ("auto", Wanted::Auto),
            ("cpu", Wanted::Cpu),
            ("cuda", Wanted::Cuda(None)),
            ("cuda:0", Wanted::Cuda(Some(0))),
            ("wgpu", Wanted::Wgpu(None)),
            ("wgpu:12", Wanted::Wgpu(Some(12))),
        ] {
            assert_eq!(wanted(word).unwrap(), meaning);
        }
        for word in ["", "gpu", "cpu:0", "auto:1", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "CUDA"] {
            let problem = wanted(word).unwrap_err();
            assert!(problem.sentence.starts_with(&format!("--device: unknown device '{word}', expected ")));
        }
        assert!(wanted("cuda:99999999999999999999").is_err());
    }

    #[test]
    fn a_job_in_tf32_is_for_gpus() {
        let exact = JobFile::resolve("char-lstm", None, &[]).unwrap().job;
        for precision in [Precision::F32, Precision::Bf16, Precision::Tf32] {
            let job = JobSpec { precision, ..exact.clone() };
            #[cfg(feature = "wgpu")]
            assert!(Chosen::Wgpu(0).check(&job).is_ok());
            match Chosen::Cpu.check(&job) {
                Ok(()) => assert_ne!(precision, Precision::Tf32),
                Err(problem) => assert_eq!(problem.sentence, "precision is tf32, which only GPUs have"),
            }
        }
    }

    #[test]
    fn a_cpu_that_is_slow_in_bf16_says_so() {
        let exact = JobFile::resolve("char-lstm", None, &[]).unwrap().job;
        let rounded = JobSpec { precision: Precision::Bf16, ..exact.clone() };
        assert!(Chosen::Cpu.remark(&exact, Simd::PORTABLE).is_none());
        assert!(Chosen::Cpu.remark(&rounded, Simd::PORTABLE).is_some_and(|text| text.starts_with("note: ")));
        #[cfg(feature = "wgpu")]
        assert!(Chosen::Wgpu(0).remark(&rounded, Simd::PORTABLE).is_none());
    }

    #[test]
    fn a_cpu_reads_what_was_trained_in_tf32() {
        let exact = JobFile::resolve("mnist-rnn", None, &[]).unwrap().job;
        let job = JobSpec { precision: Precision::Tf32, ..exact };
        let layout = StateLayout::new(ModelShape::of(&job, 28, 10), 1);
        let image = StateImage::initial(&layout, &vec![0.5; layout.parameters()]);
        let cpu = CpuBackend::new(Simd::detect(), 1);
        let (_, parameters) = open(&cpu, &job, &image, 28).unwrap();
        assert_eq!(parameters.len(), layout.parameters());
        let schedule = Schedule { steps_per_epoch: 1, evaluation_batches: 0, total_steps: 1 };
        let data = DataShape { model: layout.shape.clone(), seq_len: 28, schedule };
        let error = cpu.open(&layout, &job, &data, false).err().unwrap();
        assert_eq!(error.to_string(), "precision is tf32, which only GPUs have");
    }

    #[test]
    fn each_worker_of_a_machine_takes_the_next_device() {
        let given = |pairs: &'static [(&str, &str)]| {
            local_rank(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(given(&[]).unwrap(), 0);
        assert_eq!(given(&[("SLURM_LOCALID", "5")]).unwrap(), 5);
        assert_eq!(given(&[("SLURM_LOCALID", "5"), (LOCAL_RANK, "2")]).unwrap(), 2);
        let problem = given(&[(LOCAL_RANK, "two")]).unwrap_err();
        assert_eq!(problem.sentence, "LOCKSTEP_LOCAL_RANK is 'two', expected a number");
    }

    #[test]
    fn a_device_beyond_those_there_are_is_refused() {
        assert_eq!(ordinal("cuda:1", Some(1), 2).unwrap(), 1);
        let problem = ordinal("cuda:2", Some(2), 2).unwrap_err();
        assert_eq!(problem.sentence, "--device cuda:2: there are 2 such devices, 0 to 1");
        let problem = ordinal("wgpu:1", Some(1), 1).unwrap_err();
        assert_eq!(problem.sentence, "--device wgpu:1: there is 1 such device, number 0");
    }
}
