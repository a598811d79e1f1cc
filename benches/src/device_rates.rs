//! Each kernel of a training step alone on a device of cubecl's, beside what the device can do at most. Timed by the
//! clock, many launches between two synchronisations, as a step has them.

use std::time::{Duration, Instant};

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use kernels::cube::guard::{device_panic, keep_device_panic};
use kernels::cube::roofline;
use protocol::job::Precision;
use protocol::problem::Problem;

use crate::summary::median;

/// A kernel is launched so often that the launches between two synchronisations take so long.
const BURST: Duration = Duration::from_millis(20);
/// How often that is measured.
const BURSTS: usize = 7;
/// Slow kernels do with fewer: after this time no more than [`FEWEST_BURSTS`] are begun.
const BURSTS_LIMIT: Duration = Duration::from_secs(2);
const FEWEST_BURSTS: usize = 3;
/// Cubes that multiply and add at once: some for each multiprocessor of the largest devices.
const FMA_CUBES: u32 = 2048;
/// Floats that are copied, 128 MiB: more than any cache, and as much as Vulkan's least devices bind at once.
const COPIED_FLOATS: usize = 1 << 25;

/// What a device can do at most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Multiply-adds in registers, on tensor cores where there are some for the precision, GFLOP/s.
    pub gflop_s: f64,
    /// Bytes read and as many written by a copy, GB/s.
    pub gb_s: f64,
    /// Microseconds of a launch that does nothing to speak of.
    pub launch_us: f64,
}

/// What a call of a kernel does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations of its products.
    pub flop: u64,
    /// Bytes that it must read and write, each once.
    pub bytes: u64,
    /// Time steps of a layer; 0 where that says nothing.
    pub layer_steps: usize,
}

/// What one kernel takes.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceRate {
    /// Which one.
    pub kernel: &'static str,
    /// Microseconds of a call, median.
    pub us: f64,
    /// Of that for each time step of a layer.
    pub us_per_layer_step: Option<f64>,
    /// GFLOP/s of its products.
    pub gflop_s: Option<f64>,
    /// Their share of the multiply-adds in registers.
    pub of_fma_rate: Option<f64>,
    /// GB/s.
    pub gb_s: f64,
    /// Their share of a copy's.
    pub of_copy_rate: f64,
}

/// Measures kernels on one device.
pub struct DeviceMeter<R: Runtime> {
    pub(crate) client: ComputeClient<R>,
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// The kernels measured so far.
    pub(crate) rates: Vec<DeviceRate>,
}

impl<R: Runtime> DeviceMeter<R> {
    /// A meter that knows the device's ceilings for operands of this precision. Takes about a second.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(client: ComputeClient<R>, precision: Precision) -> Result<Self, Problem> {
        keep_device_panic();
        let mut rounds = 1;
        let fma = loop {
            let mut flop = 0;
            let mut launch = || flop = roofline::multiply_add(&client, precision, FMA_CUBES, rounds);
            let seconds = seconds(&client, &mut launch)?;
            if seconds >= BURST.as_secs_f64() / 2.0 {
                break flop as f64 / seconds;
            }
            rounds *= 2;
        };
        let [from, to] = [(); 2].map(|()| client.empty(COPIED_FLOATS * size_of::<f32>()));
        let bytes = roofline::copy(&client, &from, &to, COPIED_FLOATS);
        let copy = seconds(&client, || {
            roofline::copy(&client, &from, &to, COPIED_FLOATS);
        })?;
        let launch = seconds(&client, || {
            roofline::copy(&client, &from, &to, 4);
        })?;
        let ceilings =
            Ceilings { gflop_s: fma / 1e9, gb_s: bytes as f64 / copy / 1e9, launch_us: 1e6 * launch };
        Ok(Self { client, ceilings, rates: Vec::new() })
    }

    /// Measures one kernel, which `launch` launches.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn kernel(
        &mut self,
        kernel: &'static str,
        work: Work,
        launch: impl FnMut(),
    ) -> Result<(), Problem> {
        let seconds = seconds(&self.client, launch)?;
        let Ceilings { gflop_s, gb_s, .. } = self.ceilings;
        let (rate, bandwidth) = (work.flop as f64 / seconds / 1e9, work.bytes as f64 / seconds / 1e9);
        let has_products = work.flop > 0;
        self.rates.push(DeviceRate {
            kernel,
            us: 1e6 * seconds,
            us_per_layer_step: (work.layer_steps > 0).then(|| 1e6 * seconds / work.layer_steps as f64),
            gflop_s: has_products.then_some(rate),
            of_fma_rate: has_products.then_some(rate / gflop_s),
            gb_s: bandwidth,
            of_copy_rate: bandwidth / gb_s,
        });
        Ok(())
    }
}

/// Median seconds of one call.
fn seconds<R: Runtime>(client: &ComputeClient<R>, mut call: impl FnMut()) -> Result<f64, Problem> {
    let mut burst = |calls: u32| {
        let started = Instant::now();
        (0..calls).for_each(|_| call());
        synchronize(client)?;
        Ok::<Duration, Problem>(started.elapsed())
    };
    // The first call compiles the kernel.
    burst(1)?;
    let mut calls = 1;
    while burst(calls)? < BURST {
        calls *= 2;
    }
    let (started, mut times) = (Instant::now(), Vec::with_capacity(BURSTS));
    while times.len() < BURSTS && (times.len() < FEWEST_BURSTS || started.elapsed() < BURSTS_LIMIT) {
        times.push(burst(calls)?.as_secs_f64() / f64::from(calls));
    }
    Ok(median(times))
}

fn synchronize<R: Runtime>(client: &ComputeClient<R>) -> Result<(), Problem> {
    let failed = |cause: &dyn std::fmt::Display| Problem::failed(format!("the device fails: {cause}"));
    block_on(client.sync()).map_err(|error| failed(&error))?;
    device_panic().map_or(Ok(()), |cause| Err(failed(&cause)))
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

    use super::*;
    use crate::kernel_rates::KernelSizes;
    use crate::workload::Workload;

    #[test]
    fn every_kernel_of_every_cell_is_measured_beside_the_ceilings() {
        let mut meter = DeviceMeter::new(WgpuRuntime::client(&WgpuDevice::Cpu), Precision::F32).unwrap();
        let Ceilings { gflop_s, gb_s, launch_us } = meter.ceilings;
        assert!(gflop_s > 0.0 && gb_s > 0.0 && launch_us > 0.0, "{:?}", meter.ceilings);
        for (preset, cell) in [("mnist-rnn", "rnn"), ("mnist-lstm", "lstm"), ("mnist-gru", "gru")] {
            let settings = [("hidden_size", "20"), ("batch_size", "16")];
            let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
            let rates = meter.measure(&KernelSizes::of(&Workload::new(preset, &settings).unwrap())).unwrap();
            assert_eq!(rates.len(), 11);
            assert_eq!(
                [rates[0].kernel, rates[1].kernel],
                [format!("{cell} forward"), format!("{cell} backward")]
            );
            for rate in rates {
                assert!(rate.us > 0.0 && rate.gb_s > 0.0 && rate.of_copy_rate > 0.0, "{rate:?}");
                // Other programs may disturb the one measurement or the other, but not so much.
                assert!(rate.of_fma_rate.is_none_or(|share| 0.0 < share && share < 3.0), "{rate:?}");
                let steps = rate.us_per_layer_step.map(|us| (rate.us / us).round());
                assert!(steps.is_none_or(|steps| steps == 28.0), "{rate:?}");
            }
        }
    }
}
