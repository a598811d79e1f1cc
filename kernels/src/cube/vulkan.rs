//! The devices that wgpu finds.

use cubecl::Runtime;
use cubecl::device::Device;
use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};

/// cubecl's kinds of devices: discrete, integrated and virtual GPUs, CPUs.
const KINDS: std::ops::Range<u16> = 0..4;

/// All devices, those that are likely to be fastest first. A client of another panics.
pub fn devices() -> Vec<WgpuDevice> {
    let backend = AutoGraphicsApi::backend();
    KINDS.flat_map(|kind| WgpuRuntime::enumerate_devices(kind, &backend)).map(WgpuDevice::from_id).collect()
}
