//! A device that keeps the CUDA C++ of every kernel that is launched on it, as an NVIDIA GPU's device would give it to
//! NVRTC. Neither a GPU nor a driver is needed. It computes nothing, and buffers have no memory; or it computes with the
//! host's processor (see `emulated`).
//!
//! `scripts/cuda-check` drives the training step on it and compiles what comes out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::emulated::{Emulator, FencedMemory, Place};
use cubecl::bytes::Bytes;
use cubecl::client::ComputeClient;
use cubecl::cuda::{CudaCompiler, CudaRuntime};
use cubecl::device::{Device, DeviceId, DeviceService, ServerUtilitiesHandle};
use cubecl::future::DynFut;
use cubecl::ir::{
    DeviceProperties, HardwareProperties, MemoryDeviceProperties, TargetProperties, VectorSize,
};
use cubecl::profile::{ProfileDuration, TimingMethod};
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, IoError, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::stream_id::StreamId;
use cubecl::zspace::{Shape, Strides};
use cubecl::{Compiler, CubeCount, CubeTask, ExecutionMode, MemoryUsage, Runtime};
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::CudaWmmaCompiler;
use cubecl_cpp::shared::{DialectWmmaCompiler, register_wmma_features};
use cubecl_runtime::allocator::PitchedMemoryLayoutPolicy;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{ManagedMemoryHandle, MemoryAllocationMode};
use cubecl_runtime::storage::ManagedResource;
use cubecl_runtime::timestamp_profiler::TimestampProfiler;

/// A generation of NVIDIA's GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Architecture {
    /// A100.
    Sm80,
    /// H100, H200.
    Sm90,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Sm80, Self::Sm90];

    /// As NVRTC is told it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90 => "sm_90a",
        }
    }

    /// Bytes of shared memory that a cube may have at most.
    pub const fn shared_memory_bytes(self) -> usize {
        match self {
            Self::Sm80 => 163 << 10,
            Self::Sm90 => 227 << 10,
        }
    }

    const fn version(self) -> u32 {
        match self {
            Self::Sm80 => 80,
            Self::Sm90 => 90,
        }
    }

    const fn multiprocessors(self) -> u32 {
        match self {
            Self::Sm80 => 108,
            Self::Sm90 => 132,
        }
    }

    /// What `cubecl-cuda` says of such a device, as far as kernels can ask.
    fn properties(self) -> DeviceProperties {
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: self.shared_memory_bytes(),
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: MOST_UNITS,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(self.multiprocessors()),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            max_vector_size: VectorSize::MAX,
        };
        let memory = MemoryDeviceProperties { max_page_size: 1 << 34, alignment: ALIGNMENT as u64 };
        let mut properties =
            DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
        cubecl_cpp::register_supported_types(&mut properties);
        let architecture = CudaArchitecture { version: self.version() };
        register_wmma_features(CudaWmmaCompiler::supported_wmma_combinations(&architecture), &mut properties);
        properties
    }

    fn options(self) -> <CudaCompiler as Compiler>::CompilationOptions {
        let mut options = <CudaCompiler as Compiler>::CompilationOptions::default();
        let features = &mut options.supports_features;
        // As cubecl-cuda has them. Fast functions are taken only by kernels that ask for them.
        features.fast_math = true;
        features.fast_tanh = true;
        features.grid_constants = true;
        features.clusters = self >= Self::Sm90;
        features.elect_sync = self >= Self::Sm90;
        options
    }
}

/// Units of a cube.
pub(super) const MOST_UNITS: u32 = 1024;

/// Alignment of buffers on a CUDA device, in bytes.
pub(super) const ALIGNMENT: usize = 512;

/// The kernel of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// What it is compiled for.
    pub architecture: Architecture,
    /// Its name in the source.
    pub entry: String,
    /// Its kind, and the values that it was made for, as cubecl prints them.
    pub id: String,
    /// Units of a cube.
    pub units: u32,
    /// Bytes of shared memory that the launch gives each cube.
    pub shared_bytes: usize,
    /// CUDA C++.
    pub text: String,
}

/// All kernels whose launches were kept in this process, in the order of their architectures and names.
pub fn launched() -> Vec<KernelSource> {
    kernels().values().cloned().collect()
}

static KERNELS: Mutex<BTreeMap<String, KernelSource>> = Mutex::new(BTreeMap::new());

fn kernels() -> MutexGuard<'static, BTreeMap<String, KernelSource>> {
    KERNELS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device of an architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceDevice {
    /// What its kernels are written for.
    pub architecture: Architecture,
    /// Whether it runs them.
    pub launches: Launches,
}

/// What becomes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launches {
    /// The kernel's source is kept. What is read is zero.
    Kept,
    /// The host's processor runs it. Each order is another one in which threads and cubes run; that of 0 is upwards.
    Emulated {
        /// Less than 127.
        order: u8,
    },
}

impl Default for SourceDevice {
    fn default() -> Self {
        Self { architecture: Architecture::Sm90, launches: Launches::Kept }
    }
}

impl Device for SourceDevice {
    fn from_id(id: DeviceId) -> Self {
        let [launches, architecture] = id.index_id.to_be_bytes();
        let launches = launches.checked_sub(1).map_or(Launches::Kept, |order| Launches::Emulated { order });
        Self { architecture: Architecture::ALL[usize::from(architecture)], launches }
    }

    fn to_id(&self) -> DeviceId {
        let launches = match self.launches {
            Launches::Kept => 0,
            Launches::Emulated { order } => order + 1,
        };
        DeviceId { type_id: TYPE_ID, index_id: u16::from_be_bytes([launches, self.architecture as u8]) }
    }
}

/// No other runtime's devices have it.
const TYPE_ID: u16 = u16::MAX;

/// The runtime of [`SourceDevice`].
#[derive(Debug, Clone)]
pub struct SourceRuntime;

impl Runtime for SourceRuntime {
    type Compiler = CudaCompiler;
    type Server = SourceServer;
    type Device = SourceDevice;

    fn client(device: &SourceDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "cuda source"
    }

    fn max_cube_count() -> (u32, u32, u32) {
        CudaRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        CudaRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        CudaRuntime::target_properties()
    }

    fn enumerate_devices(_: u16, (): &()) -> Vec<DeviceId> {
        let device = |architecture| SourceDevice { architecture, launches: Launches::Kept };
        Architecture::ALL.map(|architecture| device(architecture).to_id()).to_vec()
    }
}

/// What runs behind a [`SourceDevice`].
#[derive(Debug)]
pub struct SourceServer {
    architecture: Architecture,
    emulator: Option<Emulator>,
    utilities: Arc<ServerUtilities<Self>>,
    timestamps: TimestampProfiler,
}

fn source(
    architecture: Architecture,
    kernel: &dyn CubeTask<CudaCompiler>,
    mode: ExecutionMode,
) -> KernelSource {
    let compiled = kernel
        .compile(&mut CudaCompiler::default(), &architecture.options(), mode, kernel.address_type())
        .unwrap_or_else(|error| panic!("{}: {error}", kernel.name()));
    let units = compiled.cube_dim.num_elems();
    let shared_bytes = compiled.repr.as_ref().map_or(0, |kernel| kernel.shared_memory_size());
    assert!(
        units <= MOST_UNITS && shared_bytes <= architecture.shared_memory_bytes(),
        "{}: {units} units and {shared_bytes} bytes of shared memory are more than {} has",
        kernel.name(),
        architecture.name()
    );
    assert_eq!(units, compiled.cube_dim.x, "{}: a cube of more dimensions than one", kernel.name());
    KernelSource {
        architecture,
        entry: compiled.entrypoint_name,
        id: format!("{:?}", kernel.id()),
        units,
        shared_bytes,
        text: compiled.source,
    }
}

impl DeviceService for SourceServer {
    fn init(id: DeviceId) -> Self {
        let SourceDevice { architecture, launches } = SourceDevice::from_id(id);
        let (properties, logger) = (architecture.properties(), Arc::new(ServerLogger::default()));
        let emulator = match launches {
            Launches::Kept => None,
            Launches::Emulated { order } => Some(Emulator::new(&properties.memory, logger.clone(), order)),
        };
        let policy = PitchedMemoryLayoutPolicy::new(ALIGNMENT);
        let utilities = Arc::new(ServerUtilities::new(properties, logger, (), policy));
        Self { architecture, emulator, utilities, timestamps: TimestampProfiler::default() }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for SourceServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl ComputeServer for SourceServer {
    type Kernel = Box<dyn CubeTask<CudaCompiler>>;
    type Info = ();
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Storage = FencedMemory;

    /// # Safety
    /// If it is run: the arguments are those of the kernel.
    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        cubes: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _: StreamId,
    ) {
        let architecture = self.architecture;
        let key = format!("{} {:?} {mode:?}", architecture.name(), kernel.id());
        let Some(emulator) = &mut self.emulator else {
            kernels().entry(key).or_insert_with(|| source(architecture, kernel.as_ref(), mode));
            return;
        };
        if !emulator.has(&key) {
            emulator.add(key.clone(), &source(architecture, kernel.as_ref(), mode));
        }
        let CubeCount::Static(x, y, z) = cubes else { panic!("{key}: the host counts the cubes") };
        emulator.launch(&key, [x, y, z], arguments);
    }

    fn initialize_memory(&mut self, buffer: ManagedMemoryHandle, bytes: u64, _: StreamId) {
        if let Some(emulator) = &mut self.emulator {
            emulator.reserve(buffer, bytes);
        }
    }

    fn write(&mut self, to: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        if let Some(emulator) = &mut self.emulator {
            for (CopyDescriptor { handle, .. }, bytes) in to {
                emulator.write(handle, &bytes);
            }
        }
    }

    fn read(&mut self, from: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let read = |CopyDescriptor { handle, .. }| match &mut self.emulator {
            None => vec![0; handle.size_in_used() as usize],
            Some(emulator) => emulator.read(handle),
        };
        let read = from.into_iter().map(read).map(Bytes::from_bytes_vec).collect();
        Box::pin(async move { Ok(read) })
    }

    fn get_resource(&mut self, _: Binding, _: StreamId) -> Result<ManagedResource<Place>, ServerError> {
        Err(IoError::UnsupportedIoOperation { backtrace: cubecl::backtrace::BackTrace::capture() }.into())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn sync(&mut self, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(MemoryUsage { number_allocs: 0, bytes_in_use: 0, bytes_padding: 0, bytes_reserved: 0 })
    }

    fn memory_cleanup(&mut self, _: StreamId) {}

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }
}

#[cfg(test)]
mod tests {
    use cubecl::future::block_on;

    use super::*;
    use crate::cube::guard::abort_on_device_panic;
    use crate::cube::roofline::copy;

    #[test]
    fn what_is_launched_is_kept_once_for_each_architecture() {
        abort_on_device_panic();
        for architecture in Architecture::ALL {
            let device = SourceDevice { architecture, launches: Launches::Kept };
            let client = SourceRuntime::client(&device);
            let buffer = client.empty(64);
            for len in [4, 8, 16] {
                copy(&client, &buffer, &buffer, len);
            }
            block_on(client.sync()).unwrap();
            assert_eq!(client.read_one(buffer).unwrap()[..], [0; 64]);
            assert_eq!(
                client.properties().hardware.max_shared_memory_size,
                architecture.shared_memory_bytes()
            );
            let copies = launched();
            let of_this =
                |kernel: &&KernelSource| kernel.architecture == architecture && kernel.entry == "copy_kernel";
            let [kernel] = copies.iter().filter(of_this).collect::<Vec<_>>()[..] else {
                panic!("{copies:?}");
            };
            assert_eq!((kernel.units, kernel.shared_bytes), (256, 0));
            assert!(kernel.text.contains("__launch_bounds__(256)copy_kernel"), "{}", kernel.text);
        }
    }
}
