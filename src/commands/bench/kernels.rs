//! `lockstep bench kernels`: the kernels of a training step, one by one.

use benches::kernel_rates::{KernelRate, KernelSizes, measure};
use benches::workload::Workload;
use clap::Args;
use kernels::Simd;
use protocol::job::{Precision, presets};
use protocol::problem::{Exit, Problem};
use serde_json::json;

use super::rounded;
use crate::args::SimdArg;
use crate::commands::print;
#[cfg(not(all(feature = "cuda", feature = "wgpu")))]
use crate::device::not_built;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::device::ordinal;
use crate::device::{Wanted, wanted};

#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Presets whose sizes are taken [default: all]
    #[arg(value_name = "PRESET")]
    presets: Vec<String>,
    /// Units of a layer, instead of the preset's; several with commas, and so below
    #[arg(long, value_name = "H", value_delimiter = ',')]
    hidden: Vec<u32>,
    /// Rows of a batch, instead of the preset's
    #[arg(long, value_name = "B", value_delimiter = ',')]
    batch: Vec<u32>,
    /// Time steps of a row, instead of the preset's
    #[arg(long, value_name = "T", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    steps: Vec<u16>,
    /// What the operands of products are rounded to: f32, bf16 or, on GPUs, tf32
    #[arg(long, value_name = "PRECISION", default_value = "f32")]
    precision: String,
    /// What computes: cpu (one thread), cuda, cuda:N, wgpu or wgpu:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    simd: SimdArg,
    /// As JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &KernelsArgs) -> Result<Exit, Problem> {
    let simd = args.simd.resolve()?;
    let wanted = wanted(&args.device)?;
    let all_sizes = all_sizes(args)?;
    if matches!(wanted, Wanted::Auto | Wanted::Cpu)
        && all_sizes.iter().any(|(_, sizes)| sizes.precision == Precision::Tf32)
    {
        return Err(Problem::usage("precision is tf32, which only GPUs have")
            .hint("give --device cuda or wgpu, or --precision f32 or bf16"));
    }
    match wanted {
        Wanted::Auto | Wanted::Cpu => on_cpu(args, simd, &all_sizes)?,
        Wanted::Cuda(number) => on_cuda(args, number, &all_sizes)?,
        Wanted::Wgpu(number) => on_wgpu(args, number, &all_sizes)?,
    }
    Ok(Exit::Done)
}

type PresetSizes = (String, KernelSizes);

/// All presets at all sizes that were asked for.
fn all_sizes(args: &KernelsArgs) -> Result<Vec<PresetSizes>, Problem> {
    let all = || presets().into_iter().map(|(name, _)| name).collect();
    let presets: Vec<String> = if args.presets.is_empty() { all() } else { args.presets.clone() };
    let mut all_sizes = Vec::new();
    for preset in presets {
        for hidden in choices(&args.hidden) {
            for batch in choices(&args.batch) {
                let changed = [("hidden_size", hidden), ("batch_size", batch)];
                let changed =
                    changed.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.to_string())));
                let changed = changed.chain([("precision".to_owned(), args.precision.clone())]);
                let sizes = KernelSizes::of(&Workload::new(&preset, &changed.collect::<Vec<_>>())?);
                for steps in choices(&args.steps) {
                    let seq_len = steps.map_or(sizes.seq_len, usize::from);
                    all_sizes.push((preset.clone(), KernelSizes { seq_len, ..sizes }));
                }
            }
        }
    }
    Ok(all_sizes)
}

/// Each of them, or the preset's own.
fn choices<T: Copy>(given: &[T]) -> Vec<Option<T>> {
    if given.is_empty() { vec![None] } else { given.iter().copied().map(Some).collect() }
}

fn heading(preset: &str, sizes: &KernelSizes, on: &str) -> String {
    let KernelSizes { hidden_size, batch_size, seq_len, precision, .. } = sizes;
    format!("{preset}  H {hidden_size}, batch {batch_size}, T {seq_len}, {precision}, {on}\n")
}

fn on_cpu(args: &KernelsArgs, simd: Simd, all_sizes: &[PresetSizes]) -> Result<(), Problem> {
    for (preset, sizes) in all_sizes {
        if !args.json {
            print(&heading(preset, sizes, &simd.to_string()))?;
        }
        for KernelRate { kernel, unit, units, ns_per_unit, gflop_s, of_fma_rate } in measure(simd, sizes)? {
            print(&if args.json {
                let object = json!({
                    "preset": preset,
                    "device": "cpu",
                    "precision": sizes.precision,
                    "simd": simd.to_string(),
                    "hidden_size": sizes.hidden_size,
                    "batch_size": sizes.batch_size,
                    "seq_len": sizes.seq_len,
                    "kernel": kernel,
                    "unit": unit,
                    "units": units,
                    "ns_per_unit": rounded(ns_per_unit),
                    "gflop_s": gflop_s.map(rounded),
                    "of_fma_rate": of_fma_rate.map(rounded),
                });
                format!("{object}\n")
            } else {
                let rate = match (gflop_s, of_fma_rate) {
                    (Some(rate), Some(share)) => format!("  {rate:>7.1} GFLOP/s  {:>5.1} %", 100.0 * share),
                    _ => String::new(),
                };
                format!("  {kernel:<25}  {ns_per_unit:>9.3} ns per {unit:<9}{rate}\n")
            })?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(args: &KernelsArgs, _: Option<usize>, _: &[PresetSizes]) -> Result<(), Problem> {
    Err(not_built(&args.device, "cuda"))
}

#[cfg(feature = "cuda")]
fn on_cuda(args: &KernelsArgs, number: Option<usize>, all_sizes: &[PresetSizes]) -> Result<(), Problem> {
    use cubecl::cuda::{CudaDevice, CudaRuntime};
    let cuda = kernels::cuda::Cuda::look().map_err(|missing| {
        Problem::usage(format!("--device {}: {missing}", args.device)).hint(missing.hint())
    })?;
    let number = ordinal(&args.device, number, cuda.devices.len())?;
    on_device::<CudaRuntime>(args, &cuda.devices[number].name, &CudaDevice::new(number), all_sizes)
}

#[cfg(not(feature = "wgpu"))]
fn on_wgpu(args: &KernelsArgs, _: Option<usize>, _: &[PresetSizes]) -> Result<(), Problem> {
    Err(not_built(&args.device, "wgpu"))
}

#[cfg(feature = "wgpu")]
fn on_wgpu(args: &KernelsArgs, number: Option<usize>, all_sizes: &[PresetSizes]) -> Result<(), Problem> {
    use cubecl::wgpu::WgpuRuntime;
    let devices = kernels::cube::vulkan::devices();
    if devices.is_empty() {
        return Err(Problem::usage(format!("--device {}: there is no Vulkan device", args.device))
            .hint("install the driver of the GPU, or Mesa's lavapipe (Debian: mesa-vulkan-drivers)"));
    }
    let device = &devices[ordinal(&args.device, number, devices.len())?];
    on_device::<WgpuRuntime>(args, &format!("{device:?}"), device, all_sizes)
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn on_device<R: cubecl::Runtime>(
    args: &KernelsArgs,
    name: &str,
    device: &R::Device,
    all_sizes: &[PresetSizes],
) -> Result<(), Problem> {
    use benches::device_rates::{Ceilings, DeviceMeter, DeviceRate};
    let precision = all_sizes.first().map_or(Precision::F32, |(_, sizes)| sizes.precision);
    let mut meter = DeviceMeter::new(R::client(device), precision)?;
    let Ceilings { gflop_s, gb_s, launch_us } = meter.ceilings;
    print(&if args.json {
        let object = json!({
            "kind": "ceilings",
            "device": args.device,
            "name": name,
            "precision": precision,
            "fma_rate_gflop_s": rounded(gflop_s),
            "copy_gb_s": rounded(gb_s),
            "launch_us": rounded(launch_us),
        });
        format!("{object}\n")
    } else {
        format!(
            "{name}, {precision}: {gflop_s:.1} GFLOP/s of multiply-adds, {gb_s:.1} GB/s copied, {launch_us:.1} us a launch\n"
        )
    })?;
    for (preset, sizes) in all_sizes {
        if !args.json {
            print(&heading(preset, sizes, name))?;
        }
        for rate in meter.measure(sizes)? {
            let DeviceRate { kernel, us, us_per_layer_step, gflop_s, of_fma_rate, gb_s, of_copy_rate } = rate;
            print(&if args.json {
                let object = json!({
                    "kind": "kernel",
                    "preset": preset,
                    "device": args.device,
                    "precision": precision,
                    "hidden_size": sizes.hidden_size,
                    "batch_size": sizes.batch_size,
                    "seq_len": sizes.seq_len,
                    "kernel": kernel,
                    "us_med": rounded(us),
                    "us_per_layer_step": us_per_layer_step.map(rounded),
                    "gflop_s": gflop_s.map(rounded),
                    "of_fma_rate": of_fma_rate.map(rounded),
                    "gb_s": rounded(gb_s),
                    "of_copy_rate": rounded(of_copy_rate),
                });
                format!("{object}\n")
            } else {
                let step = us_per_layer_step.map_or(String::new(), |us| format!("{us:.3} us a step"));
                let rate = match (gflop_s, of_fma_rate) {
                    (Some(rate), Some(share)) => format!("{rate:>8.1} GFLOP/s {:>5.1} %", 100.0 * share),
                    _ => " ".repeat(24),
                };
                let copied = format!("{gb_s:>8.1} GB/s {:>5.1} %", 100.0 * of_copy_rate);
                format!("  {kernel:<22} {us:>10.1} us  {step:<18}{rate} {copied}\n")
            })?;
        }
    }
    Ok(())
}
