//! An NVIDIA GPU on the host's processor: the C++ compiler of the host compiles the CUDA C++ of each launch, and one thread
//! runs it. What is run is the text that a GPU would be given, with the places for the weights and the tiles that it would
//! have; slowly, and without a GPU or a driver. `device.hpp` and `grid.hpp` have what the text needs.
//!
//! More is seen here than on a GPU. Threads and cubes run in an order of our choice, so a race shows as another result in
//! another order. A launch fails if its kernel
//!
//! - lets threads of a cube wait at different places, or end while others wait;
//! - writes beyond its shared memory or closely beside a buffer;
//! - writes to what another of its arguments promises not to change (`const __restrict__`): a GPU may read that from a cache
//!   that knows of no writes.
//!
//! What is read before it was written is NaN, as is what lies closely beside a buffer.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::ir::MemoryDeviceProperties;
use cubecl::server::{Binding, IoError, KernelArguments};
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryConfiguration, MemoryManagement, MemoryManagementOptions,
};
use cubecl_runtime::storage::{ComputeStorage, StorageHandle, StorageId, StorageUtilization};
use libloading::Library;

use super::source::{ALIGNMENT, KernelSource, MOST_UNITS};

/// Before and after the kernel's text.
const DEVICE: &str = include_str!("device.hpp");
const GRID: &str = include_str!("grid.hpp");

/// Of each thread of a cube. The compiler refuses functions that would take half of it.
const STACK_BYTES: usize = 64 << 10;

/// Unwritten memory, and what lies beside a buffer: NaN, as floats.
const UNWRITTEN: u8 = 0xFF;
/// Bytes before and after a buffer that nobody may touch.
const FENCE: usize = 1024;

/// The host's C++ compiler.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

/// Whether a test cannot run kernels here, which it then says: there is no C++ compiler.
pub fn skips() -> bool {
    let version =
        Command::new(compiler()).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let skips = !version.is_ok_and(|status| status.success());
    if skips {
        println!(
            "skipped: CUDA kernels on the host's processor: there is no C++ compiler (apt-get install g++)"
        );
    }
    skips
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What carries out the launches of a device.
pub(super) struct Emulator {
    memory: MemoryManagement<FencedMemory>,
    kernels: HashMap<String, Arc<Kernel>>,
    stacks: Stacks,
    /// Of threads and cubes: upwards, or which of the others.
    order: u64,
}

impl Emulator {
    pub(super) fn new(properties: &MemoryDeviceProperties, logger: Arc<ServerLogger>, order: u8) -> Self {
        // Each buffer has a place of its own, and no more of it than it asks for.
        let options = MemoryManagementOptions::new("emulated").mode(MemoryAllocationMode::Persistent);
        let exact = MemoryDeviceProperties { alignment: size_of::<u32>() as u64, ..properties.clone() };
        let pools = MemoryConfiguration::Custom { pool_options: Vec::new() };
        Self {
            memory: MemoryManagement::from_configuration(
                FencedMemory::default(),
                &exact,
                pools,
                logger,
                options,
            ),
            kernels: HashMap::new(),
            stacks: Stacks::new(),
            order: order.into(),
        }
    }

    /// Gives a buffer its memory.
    pub(super) fn reserve(&mut self, buffer: ManagedMemoryHandle, bytes: u64) {
        let reserved = self.memory.reserve(bytes).expect("the host has memory");
        let place = self.memory.get_resource(reserved.clone().binding(), None, None);
        place.expect("it was reserved").bytes_mut().fill(UNWRITTEN);
        self.memory.bind(reserved, buffer, 0).expect("it was reserved");
    }

    fn place(&mut self, binding: Binding) -> Place {
        let Binding { memory, offset_start, offset_end, .. } = binding;
        self.memory.get_resource(memory, offset_start, offset_end).expect("the buffer has memory")
    }

    pub(super) fn write(&mut self, to: Binding, bytes: &[u8]) {
        self.place(to).bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn read(&mut self, from: Binding) -> Vec<u8> {
        self.place(from).bytes().to_vec()
    }

    pub(super) fn has(&self, kernel: &str) -> bool {
        self.kernels.contains_key(kernel)
    }

    pub(super) fn add(&mut self, kernel: String, source: &KernelSource) {
        self.kernels.insert(kernel, Kernel::of(source));
    }

    /// Runs a kernel that was added.
    ///
    /// # Panics
    /// The kernel does something that it must not.
    pub(super) fn launch(&mut self, kernel: &str, cubes: [u32; 3], arguments: KernelArguments) {
        let KernelArguments { buffers, info, tensor_maps } = arguments;
        let is_known = tensor_maps.is_empty() && info.dynamic_metadata_offset >= info.data.len();
        assert!(is_known, "{kernel}: arguments of other kinds than buffers and numbers");
        let places: Vec<Place> = buffers.into_iter().map(|buffer| self.place(buffer)).collect();
        let kernel = &self.kernels[kernel];
        // SAFETY: cubecl has written the kernel for these arguments.
        let outcome = unsafe { kernel.run(cubes, &places, &info.data, &mut self.stacks, self.order) };
        outcome.unwrap_or_else(|fault| panic!("{}: {fault}", kernel.name));
    }
}

impl std::fmt::Debug for Emulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emulator").field("kernels", &self.kernels.len()).finish_non_exhaustive()
    }
}

/// `run_grid` of grid.hpp.
type RunGrid =
    unsafe extern "C" fn(*const *const c_void, *const u32, u32, *mut u8, usize, u64) -> *const c_char;

/// A compiled kernel.
struct Kernel {
    name: String,
    threads: u32,
    /// Of each buffer, whether the kernel promises that nobody writes to it.
    is_constant: Vec<bool>,
    /// One launch at a time: the library has one cube's shared memory.
    run: Mutex<RunGrid>,
    /// Where `run` is.
    _library: Library,
}

impl Kernel {
    /// Compiles a kernel, unless a device of this process has done so.
    fn of(source: &KernelSource) -> Arc<Self> {
        static COMPILED: Mutex<BTreeMap<String, Arc<Kernel>>> = Mutex::new(BTreeMap::new());
        let key = format!("{} {}", source.shared_bytes, source.text);
        lock(&COMPILED).entry(key).or_insert_with(|| Arc::new(Self::compile(source))).clone()
    }

    fn compile(source: &KernelSource) -> Self {
        let KernelSource { entry, units, shared_bytes, text, .. } = source;
        assert!(*units <= MOST_UNITS, "{entry}: a cube of {units} threads");
        // What they have is in device.hpp.
        let text: String = text
            .lines()
            .filter(|line| !line.starts_with("#include"))
            .map(|line| format!("{line}\n"))
            .collect();
        let (_, parameters) = text.split_once(&format!("{entry} (")).expect("it has an entry");
        let (parameters, _) = parameters.split_once(')').expect("it has parameters");
        let is_constant = parameters.split(',').filter(|parameter| parameter.contains('*'));
        let is_constant = is_constant.map(|parameter| parameter.trim_start().starts_with("const")).collect();
        let file = LibraryFile::new();
        let mut command = Command::new(compiler());
        command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-x", "c++", "-"]);
        // A product and a sum become one operation where the text says so, nowhere else; bits are looked at as integers.
        command.args(["-ffp-contract=off", "-fno-strict-aliasing"]);
        command.arg(format!("-Werror=frame-larger-than={}", STACK_BYTES / 2));
        command.args([format!("-DKERNEL={entry}"), format!("-DSHARED_BYTES={shared_bytes}")]);
        // Some compilers have `longjmp` checked unasked, and the check knows of one stack only.
        command.args([format!("-DMOST_THREADS={MOST_UNITS}"), "-U_FORTIFY_SOURCE".to_owned()]);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("fma") {
            command.arg("-mfma");
        }
        let command = command.arg("-o").arg(&file.0).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", compiler()));
        let mut stdin = child.stdin.take().expect("it is piped");
        write!(stdin, "{DEVICE}\n{text}\n{GRID}").expect("the compiler reads");
        drop(stdin);
        let status = child.wait().expect("the compiler was started");
        assert!(status.success(), "{entry} does not compile for the host");
        // SAFETY: initialising it runs nothing, and `run_grid` has this type.
        let (library, run) = unsafe {
            let library = Library::new(&file.0).expect("it was compiled");
            let run = *library.get::<RunGrid>("run_grid").expect("grid.hpp has it");
            (library, run)
        };
        Self { name: entry.clone(), threads: *units, is_constant, run: Mutex::new(run), _library: library }
    }

    /// Runs it on a grid of cubes. An error is what it does that it must not.
    ///
    /// # Safety
    /// Its arguments are as many buffers, long enough, and then these numbers.
    unsafe fn run(
        &self,
        cubes: [u32; 3],
        buffers: &[Place],
        numbers: &[u64],
        stacks: &mut Stacks,
        order: u64,
    ) -> Result<(), String> {
        assert_eq!(self.is_constant.len(), buffers.len(), "{}", self.name);
        let of = |constant: bool| {
            let is_so = move |(_, is): &(&Place, &bool)| **is == constant;
            buffers.iter().zip(&self.is_constant).filter(is_so).map(|(buffer, _)| buffer)
        };
        if of(false).any(|written| of(true).any(|constant| constant.overlaps(written))) {
            return Err("it may write to what it promises not to change".to_owned());
        }
        // As a driver is given them: the address of each argument.
        let starts: Vec<*mut u8> = buffers.iter().map(Place::start).collect();
        let mut arguments: Vec<*const c_void> =
            starts.iter().map(|start| std::ptr::from_ref(start).cast()).collect();
        arguments.push(numbers.as_ptr().cast());
        let run = lock(&self.run);
        let stacks = stacks.0.as_mut_ptr();
        // SAFETY: `run_grid` of grid.hpp; its threads, at most MOST_UNITS, have a stack each.
        let fault =
            unsafe { run(arguments.as_ptr(), cubes.as_ptr(), self.threads, stacks, STACK_BYTES, order) };
        drop(run);
        if !fault.is_null() {
            // SAFETY: it is a literal of grid.hpp.
            return Err(unsafe { CStr::from_ptr(fault) }.to_string_lossy().into_owned());
        }
        match buffers.iter().position(|buffer| !buffer.has_its_fences()) {
            None => Ok(()),
            Some(at) => Err(format!("it has written beside its argument {at}")),
        }
    }
}

/// The stacks of a cube's threads.
struct Stacks(Vec<u8>);

impl Stacks {
    fn new() -> Self {
        Self(vec![0; MOST_UNITS as usize * STACK_BYTES])
    }
}

/// Where the compiler puts a library; it is gone with this.
struct LibraryFile(PathBuf);

impl LibraryFile {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(format!("lockstep-emulated-{process}-{count}.so")))
    }
}

impl Drop for LibraryFile {
    fn drop(&mut self) {
        // What is open stays until it is closed.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Memory of the host with a fence around each piece.
#[derive(Debug, Default)]
pub struct FencedMemory(HashMap<StorageId, Piece>);

#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    /// Where the first fence begins.
    start: usize,
}

/// A part of a piece of memory.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The whole piece, with its fences.
    piece: *mut u8,
    piece_len: usize,
    at: usize,
    len: usize,
}

// SAFETY: only the thread of the device, which owns the memory, reads and writes through it.
unsafe impl Send for Place {}

impl Place {
    /// The first byte.
    fn start(&self) -> *mut u8 {
        // SAFETY: `at` is in the piece.
        unsafe { self.piece.add(self.at) }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: they are in the piece, and nobody writes while a kernel does not run.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: they are in the piece, and nobody else looks at it while a kernel does not run.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let range = |place: &Self| (place.start().addr(), place.start().addr() + place.len);
        let ((start, end), (other_start, other_end)) = (range(self), range(other));
        start < other_end && other_start < end
    }

    fn has_its_fences(&self) -> bool {
        // SAFETY: it is all of the piece, and nobody writes while a kernel does not run.
        let piece = unsafe { std::slice::from_raw_parts(self.piece, self.piece_len) };
        let (before, rest) = piece.split_at(FENCE);
        let after = &rest[rest.len() - FENCE..];
        before.iter().chain(after).all(|byte| *byte == UNWRITTEN)
    }
}

impl ComputeStorage for FencedMemory {
    type Resource = Place;

    fn alignment(&self) -> usize {
        size_of::<u32>()
    }

    fn get(&mut self, handle: &StorageHandle) -> Place {
        let piece = self.0.get_mut(&handle.id).expect("it was allocated");
        let (at, len) = (FENCE + handle.offset() as usize, handle.size() as usize);
        let piece = &mut piece.bytes[piece.start..];
        assert!(at + len + FENCE <= piece.len(), "{handle:?} is not in its piece");
        Place { piece: piece.as_mut_ptr(), piece_len: piece.len(), at, len }
    }

    fn alloc(&mut self, size: u64) -> Result<StorageHandle, IoError> {
        let id = StorageId::new();
        let len = size as usize + 2 * FENCE;
        let mut bytes = vec![UNWRITTEN; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        bytes.truncate(start + len);
        self.0.insert(id, Piece { bytes, start });
        Ok(StorageHandle::new(id, StorageUtilization { offset: 0, size }))
    }

    fn dealloc(&mut self, id: StorageId) {
        self.0.remove(&id);
    }

    fn flush(&mut self) {}
}

#[cfg(test)]
mod tests;
