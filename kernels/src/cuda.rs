//! What there is of CUDA on this machine: driver, devices, NVRTC and its headers. Looking loads libraries and asks the
//! driver; it makes no context and takes no memory on any device.
//!
//! To be asked before anything else of CUDA: a runtime that finds no driver panics, and one that finds no headers
//! panics when it compiles its first kernel.

use std::fmt;
use std::path::{Path, PathBuf};

use cudarc::driver::{result, sys};
use cudarc::nvrtc;

/// A CUDA that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cuda {
    /// The kernel driver's version, such as `570.124.06`, or else the newest CUDA that it speaks, such as `CUDA 12.8`.
    pub driver: String,
    /// Version of the compiler that makes kernels at run time.
    pub nvrtc: (i32, i32),
    /// Folder of the headers that it reads.
    pub headers: PathBuf,
    /// By ordinal; at least one.
    pub devices: Vec<CudaGpu>,
}

/// One device that the driver shows this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaGpu {
    /// Its model.
    pub name: String,
    /// Tells devices apart.
    pub uuid: [u8; 16],
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Compute capability.
    pub capability: (i32, i32),
}

/// Why CUDA cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoCuda {
    /// There is no libcuda: no driver is installed.
    Driver,
    /// The driver is there and does not start.
    Init(String),
    /// The driver shows no device.
    Device,
    /// There is no libnvrtc.
    Nvrtc,
    /// The headers are in none of these folders.
    Headers(Vec<PathBuf>),
    /// Those of tensor cores are not in this folder.
    TensorHeaders(PathBuf),
}

impl fmt::Display for NoCuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver => f.write_str("there is no NVIDIA driver (libcuda.so.1 cannot be loaded)"),
            Self::Init(cause) => write!(f, "the NVIDIA driver does not start: {cause}"),
            Self::Device => f.write_str("the NVIDIA driver shows no device"),
            Self::Nvrtc => f.write_str("there is no NVRTC (libnvrtc.so cannot be loaded)"),
            Self::Headers(folders) => {
                let folders: Vec<String> =
                    folders.iter().map(|folder| folder.display().to_string()).collect();
                write!(f, "there are no CUDA headers (no cuda_runtime.h in {})", folders.join(", "))
            }
            Self::TensorHeaders(folder) => {
                write!(f, "there are no headers for tensor cores (no crt/mma.h in {})", folder.display())
            }
        }
    }
}

impl NoCuda {
    /// What can be done about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Driver | Self::Init(_) => "install the driver of the GPU, then see nvidia-smi",
            Self::Device => "see nvidia-smi, and that CUDA_VISIBLE_DEVICES names a device",
            Self::Nvrtc => "install the CUDA toolkit, and name its lib64 in LD_LIBRARY_PATH",
            Self::Headers(_) => "install the CUDA toolkit, and name its folder in CUDA_PATH",
            Self::TensorHeaders(_) => "install all of the CUDA toolkit, or give --set precision=f32",
        }
    }
}

impl Cuda {
    /// Looks for all that training on CUDA needs.
    ///
    /// # Errors
    /// The first thing that is missing.
    pub fn look() -> Result<Self, NoCuda> {
        let devices = devices()?;
        let nvrtc = nvrtc_version().ok_or(NoCuda::Nvrtc)?;
        let headers = headers()?;
        Ok(Self { driver: driver(), nvrtc, headers, devices })
    }

    /// Everything besides the kernels themselves that the bits of a device depend on.
    pub fn bits(&self, ordinal: usize) -> String {
        let CudaGpu { name, capability: (major, minor), .. } = &self.devices[ordinal];
        let (nvrtc_major, nvrtc_minor) = self.nvrtc;
        let driver = &self.driver;
        format!("{name} sm_{major}{minor}, driver {driver}, NVRTC {nvrtc_major}.{nvrtc_minor}")
    }
}

/// The devices that the driver shows, by ordinal.
///
/// # Errors
/// There is no driver, it does not start, or it shows no device.
pub fn devices() -> Result<Vec<CudaGpu>, NoCuda> {
    // SAFETY: loads the driver's library and lets it go again; its initialisers are NVIDIA's own.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda::Driver);
    }
    let failed = |error: result::DriverError| match error.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => NoCuda::Device,
        code => NoCuda::Init(format!("{code:?}")),
    };
    result::init().map_err(failed)?;
    let count = result::device::get_count().map_err(failed)?;
    let devices: Vec<CudaGpu> = (0..count).map(gpu).collect::<Result<_, _>>().map_err(failed)?;
    if devices.is_empty() { Err(NoCuda::Device) } else { Ok(devices) }
}

fn gpu(ordinal: i32) -> Result<CudaGpu, result::DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal)?;
    // SAFETY: the device comes from `device::get`.
    let (memory_bytes, capability) = unsafe {
        let attribute = |which| result::device::get_attribute(device, which);
        (result::device::total_mem(device)? as u64, (attribute(MAJOR)?, attribute(MINOR)?))
    };
    let uuid = result::device::get_uuid(device)?.bytes.map(|byte| byte as u8);
    Ok(CudaGpu { name: result::device::get_name(device)?, uuid, memory_bytes, capability })
}

/// The version of the kernel driver, from its own file; where that is hidden, the CUDA that it speaks.
fn driver() -> String {
    let file = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    driver_version(&file).map(str::to_owned).unwrap_or_else(|| {
        let mut version = 0;
        // SAFETY: writes one integer; the library is there, `devices` has called it.
        let _ = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
    })
}

/// The first word that is a version: the text around it differs between open and closed drivers.
fn driver_version(file: &str) -> Option<&str> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|char| char.is_ascii_digit() || char == '.');
    file.lines().next()?.split_whitespace().find(is_version)
}

/// The version of NVRTC, if it is there.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    // SAFETY: loads NVRTC's library and lets it go again; its initialisers are NVIDIA's own.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers; the library is there.
    let status = unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    (status == nvrtc::sys::nvrtcResult::NVRTC_SUCCESS).then_some((major, minor))
}

/// The folder of the CUDA headers: the one that cubecl gives NVRTC.
///
/// # Errors
/// The headers are not there.
pub fn headers() -> Result<PathBuf, NoCuda> {
    let folder = match cubecl::cuda::install::cuda_path() {
        Some(toolkit) => toolkit.join("include"),
        None => {
            let usual = ["/usr/local/cuda/include", "/opt/cuda/include"];
            return Err(NoCuda::Headers(usual.map(PathBuf::from).to_vec()));
        }
    };
    if has_headers(&folder) { Ok(folder) } else { Err(NoCuda::Headers(vec![folder])) }
}

/// Checks that NVRTC finds what the kernels of tensor cores need. Not every package of the headers has it.
///
/// # Errors
/// It does not.
pub fn tensor_headers() -> Result<(), NoCuda> {
    let folder = headers()?;
    if folder.join("crt/mma.h").is_file() { Ok(()) } else { Err(NoCuda::TensorHeaders(folder)) }
}

fn has_headers(folder: &Path) -> bool {
    folder.join("cuda_runtime.h").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_named_by_its_version() {
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 22:42:11 UTC 2024\nGCC";
        let open =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (root@x)";
        assert_eq!(driver_version(closed), Some("535.161.08"));
        assert_eq!(driver_version(open), Some("570.124.06"));
        assert_eq!(driver_version(""), None);
    }

    /// On a machine with CUDA it can be used, on one without it says what is missing; neither panics.
    #[test]
    fn looking_never_panics_and_says_what_is_missing() {
        match Cuda::look() {
            Ok(cuda) => assert!(cuda.bits(0).contains("sm_"), "{cuda:?}"),
            Err(missing) => {
                println!("{missing}; hint: {}", missing.hint());
                assert!(missing.to_string().starts_with("the") && !missing.hint().is_empty());
            }
        }
    }

    #[test]
    fn bits_name_model_driver_and_compiler() {
        let gpu = CudaGpu { name: "Some GPU".into(), uuid: [0; 16], memory_bytes: 1, capability: (9, 0) };
        let headers = PathBuf::new();
        let cuda = Cuda { driver: "570.1".into(), nvrtc: (12, 8), headers, devices: vec![gpu] };
        assert_eq!(cuda.bits(0), "Some GPU sm_90, driver 570.1, NVRTC 12.8");
    }
}
