//! The real library, loaded when it is asked for.
//!
//! Types are those of `cudarc::nccl`; its functions are looked up here. `cudarc` loads the file `libnccl.so` only, which
//! most machines lack (the library installs as `libnccl.so.2`), and panics where the file or a symbol is missing. Results
//! are read as plain numbers: a newer library may have more of them than an enum here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result as driver, sys as cuda};
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use libloading::Library as File;

use super::search::{candidates, looked_in};
use super::{
    Communicator, Direction, NcclError, NcclLibrary, OLDEST, Result, State, Transfer, UniqueId, Version,
};

/// `ncclResult_t`.
type Status = c_int;
const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;

/// `ncclFloat32`.
const FLOAT32: c_int = 7;

/// The part of `ncclConfig_t` that every version since 2.14 has; the library takes what is missing as not set.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    const NON_BLOCKING: Self =
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 21400, blocking: 0 };
}

/// Declares the functions that are used, and how each is looked up.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        #[derive(Clone, Copy)]
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> Status,)* }

        impl Functions {
            /// The first symbol that is missing is an error.
            fn of(file: &File) -> std::result::Result<Self, String> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of the function in nccl.h, unchanged since version 2.18.
                        let symbol = unsafe { file.get::<unsafe extern "C" fn($($argument),*) -> Status>($symbol) };
                        *symbol.map_err(|_| format!("it has no {}", $symbol.to_string_lossy()))?
                    },)*
                })
            }
        }
    };
}

functions! {
    unique_id = c"ncclGetUniqueId": fn(*mut ncclUniqueId);
    init = c"ncclCommInitRankConfig": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config);
    async_error = c"ncclCommGetAsyncError": fn(ncclComm_t, *mut Status);
    group_start = c"ncclGroupStart": fn();
    group_end = c"ncclGroupEnd": fn();
    send = c"ncclSend": fn(*const c_void, usize, c_int, c_int, ncclComm_t, cuda::CUstream);
    receive = c"ncclRecv": fn(*mut c_void, usize, c_int, c_int, ncclComm_t, cuda::CUstream);
    all_gather = c"ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, ncclComm_t, cuda::CUstream);
    finalize = c"ncclCommFinalize": fn(ncclComm_t);
    destroy = c"ncclCommDestroy": fn(ncclComm_t);
    abort = c"ncclCommAbort": fn(ncclComm_t);
}

/// The library.
#[derive(Clone)]
pub struct Library(Arc<Loaded>);

/// Its file, loaded for the rest of the process.
struct Loaded {
    functions: Functions,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    version: Version,
    path: String,
    /// Keeps the functions where they are. A library with threads of its own must not be unloaded.
    _file: std::mem::ManuallyDrop<File>,
}

impl Library {
    /// Searches for the library and loads it.
    ///
    /// # Errors
    /// There is none, it lacks a function, or it is older than [`OLDEST`].
    pub fn load() -> Result<Self> {
        let mut last = None;
        for path in candidates(&|name| std::env::var(name).ok()) {
            match Loaded::open(&path) {
                Ok(loaded) => return Ok(Self(Arc::new(loaded))),
                // One that is there is worth a word, one that is not is one of many places.
                Err(error @ NcclError::Old { .. }) => last = Some(error),
                Err(error) if path.is_file() => last = last.or(Some(error)),
                Err(_) => {}
            }
        }
        Err(last.unwrap_or_else(|| NcclError::Missing { looked_in: looked_in() }))
    }

    /// What was given to the dynamic loader.
    pub fn path(&self) -> &str {
        &self.0.path
    }
}

impl Loaded {
    fn open(path: &Path) -> Result<Self> {
        let text = path.display().to_string();
        let unusable = |cause: String| NcclError::Unusable { path: text.clone(), cause };
        // SAFETY: runs the initialisers of a file that is named as NCCL's, or that the user has named.
        let file = unsafe { File::new(path) }.map_err(|error| unusable(error.to_string()))?;
        // A symbol that is missing may only be of an older version: that is the better reason.
        let version = version(&file).map_err(unusable)?;
        if version < OLDEST {
            return Err(NcclError::Old { path: text, version });
        }
        let functions = Functions::of(&file).map_err(unusable)?;
        // SAFETY: the type is that of nccl.h in every version.
        let error_string =
            unsafe { file.get::<unsafe extern "C" fn(Status) -> *const c_char>(c"ncclGetErrorString") }
                .map(|symbol| *symbol)
                .map_err(|_| unusable("it has no ncclGetErrorString".to_owned()))?;
        Ok(Self { functions, error_string, version, path: text, _file: std::mem::ManuallyDrop::new(file) })
    }

    /// What a status means.
    fn check(&self, name: &'static str, status: Status) -> Result<()> {
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            status => Err(NcclError::Call { name, cause: self.words(status) }),
        }
    }

    fn words(&self, status: Status) -> String {
        // SAFETY: gives a constant text for any number.
        let text = unsafe { (self.error_string)(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: it is not null, ends with 0 and lives as long as the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

fn version(file: &File) -> std::result::Result<Version, String> {
    // SAFETY: the type is that of nccl.h in every version.
    let get = unsafe { file.get::<unsafe extern "C" fn(*mut c_int) -> Status>(c"ncclGetVersion") }
        .map_err(|_| "it has no ncclGetVersion".to_owned())?;
    let mut code = 0;
    // SAFETY: writes one integer.
    match unsafe { get(&raw mut code) } {
        SUCCESS => Ok(Version::from_code(code.max(0) as u32)),
        status => Err(format!("ncclGetVersion gave status {status}")),
    }
}

impl NcclLibrary for Library {
    type Communicator = StreamCommunicator;

    fn version(&self) -> Version {
        self.0.version
    }

    fn unique_id(&self) -> Result<UniqueId> {
        let mut id = ncclUniqueId { internal: [0; super::UNIQUE_ID_BYTES] };
        // SAFETY: writes the 128 bytes.
        self.0.check("ncclGetUniqueId", unsafe { (self.0.functions.unique_id)(&raw mut id) })?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    fn begin(&self, device: usize, id: &UniqueId, rank: u32, world_size: u32) -> Result<StreamCommunicator> {
        let context = Context::retain(device)?;
        context.enter()?;
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)
            .map_err(|error| of_driver("cuStreamCreate", error))?;
        let mut made = StreamCommunicator { library: self.0.clone(), context, stream, raw: Mutex::new(None) };
        let id = ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let (mut raw, mut config) = (null_mut(), Config::NON_BLOCKING);
        // SAFETY: the device's context is current on this thread; pointers are to locals, which the call reads before it
        // returns; it is non-blocking by its config.
        let status = unsafe {
            (self.0.functions.init)(&raw mut raw, world_size as c_int, id, rank as c_int, &raw mut config)
        };
        if !raw.is_null() {
            // From here on dropping aborts it, whatever the status.
            made.raw = Mutex::new(Some(Raw(raw)));
        }
        self.0.check("ncclCommInitRankConfig", status)?;
        Ok(made)
    }
}

/// A device's primary context, which its other users in this process share.
struct Context {
    device: cuda::CUdevice,
    raw: cuda::CUcontext,
}

impl Context {
    fn retain(ordinal: usize) -> Result<Self> {
        driver::init().map_err(|error| of_driver("cuInit", error))?;
        let device =
            driver::device::get(ordinal as c_int).map_err(|error| of_driver("cuDeviceGet", error))?;
        // SAFETY: the device comes from `device::get`.
        let raw = unsafe { driver::primary_ctx::retain(device) }
            .map_err(|error| of_driver("cuDevicePrimaryCtxRetain", error))?;
        Ok(Self { device, raw })
    }

    /// Makes it the current one of this thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: it is retained for as long as `self` lives.
        unsafe { driver::ctx::set_current(self.raw) }.map_err(|error| of_driver("cuCtxSetCurrent", error))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once by `retain`.
        let _ = unsafe { driver::primary_ctx::release(self.device) };
    }
}

fn of_driver(name: &'static str, error: driver::DriverError) -> NcclError {
    NcclError::Call { name, cause: format!("{:?}", error.0) }
}

struct Raw(ncclComm_t);

// SAFETY: a communicator may be used by any thread, by one at a time: it lies behind a mutex.
unsafe impl Send for Raw {}

/// A communicator with a stream of its own.
///
/// The mutex keeps what NCCL does not: a call that runs while another thread frees the communicator. It is held for one
/// call only, and no call of a non-blocking communicator waits for another rank, so an abort comes to its turn.
pub struct StreamCommunicator {
    library: Arc<Loaded>,
    context: Context,
    stream: cuda::CUstream,
    /// `None` once it is freed.
    raw: Mutex<Option<Raw>>,
}

// SAFETY: streams and contexts of the driver API may be used by any thread that makes the context its current one, which
// every use here does first.
unsafe impl Send for StreamCommunicator {}
// SAFETY: as above; the communicator itself lies behind a mutex.
unsafe impl Sync for StreamCommunicator {}

impl StreamCommunicator {
    fn lock(&self) -> MutexGuard<'_, Option<Raw>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes calls on the communicator, if it is still there.
    fn call(&self, calls: impl FnOnce(&Functions, ncclComm_t) -> Result<()>) -> Result<()> {
        let raw = self.lock();
        let Some(Raw(communicator)) = &*raw else { return Err(NcclError::Aborted) };
        self.context.enter()?;
        calls(&self.library.functions, *communicator)
    }

    fn free(&self, function: unsafe extern "C" fn(ncclComm_t) -> Status) {
        if let Some(Raw(communicator)) = self.lock().take() {
            // Whatever it says, the communicator is gone.
            let _ = self.context.enter();
            // SAFETY: it was there, and nobody else can have it now.
            let _ = unsafe { function(communicator) };
        }
    }
}

impl Communicator for StreamCommunicator {
    fn state(&self) -> State {
        let mut status = SUCCESS;
        let asked = self.call(|functions, communicator| {
            // SAFETY: the communicator is there, and an integer is written.
            self.library.check("ncclCommGetAsyncError", unsafe {
                (functions.async_error)(communicator, &raw mut status)
            })
        });
        match (asked, status) {
            (Err(error), _) => State::Failed(error.to_string()),
            (Ok(()), SUCCESS) => State::Ready,
            (Ok(()), IN_PROGRESS) => State::InProgress,
            (Ok(()), status) => State::Failed(self.library.words(status)),
        }
    }

    fn transfer(&self, transfers: &[Transfer]) -> Result<()> {
        let library = &self.library;
        self.call(|functions, communicator| {
            // SAFETY: takes nothing.
            library.check("ncclGroupStart", unsafe { (functions.group_start)() })?;
            let each = transfers.iter().try_for_each(|transfer| {
                let Transfer { direction, address, floats, peer } = *transfer;
                let (address, peer) = (address as *mut c_void, peer as c_int);
                // SAFETY: the communicator is there; the address is the device's, nobody follows it on the host.
                unsafe {
                    match direction {
                        Direction::Send => library.check(
                            "ncclSend",
                            (functions.send)(address, floats, FLOAT32, peer, communicator, self.stream),
                        ),
                        Direction::Receive => library.check(
                            "ncclRecv",
                            (functions.receive)(address, floats, FLOAT32, peer, communicator, self.stream),
                        ),
                    }
                }
            });
            // A group that was begun is ended, whatever happened in it.
            // SAFETY: takes nothing.
            let ended = library.check("ncclGroupEnd", unsafe { (functions.group_end)() });
            each.and(ended)
        })
    }

    fn all_gather(&self, source: u64, destination: u64, floats: usize) -> Result<()> {
        let (source, destination) = (source as *const c_void, destination as *mut c_void);
        self.call(|functions, communicator| {
            // SAFETY: the communicator is there; addresses are the device's, nobody follows them on the host.
            let status = unsafe {
                (functions.all_gather)(source, destination, floats, FLOAT32, communicator, self.stream)
            };
            self.library.check("ncclAllGather", status)
        })
    }

    fn is_idle(&self) -> Result<bool> {
        self.context.enter()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { cuda::cuStreamQuery(self.stream) } {
            cuda::CUresult::CUDA_SUCCESS => Ok(true),
            cuda::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(NcclError::Call { name: "cuStreamQuery", cause: format!("{code:?}") }),
        }
    }

    fn finalize(&self) -> Result<()> {
        self.call(|functions, communicator| {
            // SAFETY: the communicator is there.
            self.library.check("ncclCommFinalize", unsafe { (functions.finalize)(communicator) })
        })
    }

    fn destroy(&self) {
        self.free(self.library.functions.destroy);
    }

    fn abort(&self) {
        self.free(self.library.functions.abort);
    }
}

impl Drop for StreamCommunicator {
    fn drop(&mut self) {
        self.abort();
        if self.context.enter().is_ok() {
            // SAFETY: it was created in `begin`, and nothing runs on it any more.
            let _ = unsafe { driver::stream::destroy(self.stream) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is a library it has all that is used; where there is none, that is a sentence.
    #[test]
    fn loading_never_panics() {
        match Library::load() {
            Ok(library) => println!("NCCL {} from {}", NcclLibrary::version(&library), library.path()),
            Err(error) => println!("{error}"),
        }
    }

    #[test]
    fn a_file_that_is_no_nccl_is_refused_in_a_sentence() {
        let missing = Loaded::open(Path::new("/nowhere/libnccl.so.2")).err().unwrap().to_string();
        assert!(missing.starts_with("/nowhere/libnccl.so.2 cannot be used: "), "{missing}");
        let other = Loaded::open(Path::new("libm.so.6")).err().unwrap();
        assert_eq!(other.to_string(), "libm.so.6 cannot be used: it has no ncclGetVersion");
    }
}
