//! A kernel that cannot be made is dropped by cubecl without a word: the thread of the device catches the panic, launch,
//! sync and read return as if all were well, and the outputs are what they were. So nobody may go on after such a panic.

use std::io::Write;
use std::panic::{set_hook, take_hook};
use std::sync::{Once, OnceLock};

/// Threads of cubecl's devices are named so.
const DEVICE_THREAD: &str = "DSD-";

/// From now on a panic on a device's thread ends the process. Whoever trains on a device calls this first, and every test
/// that launches kernels.
pub fn abort_on_device_panic() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        on_device_panic(|sentence| {
            // Not by a macro: the test harness keeps what those print of tests that do not end.
            let _ = writeln!(std::io::stderr(), "{sentence}");
            std::process::abort();
        });
    });
}

/// From now on the first panic on a device's thread is kept for [`device_panic`] instead of printed.
pub fn keep_device_panic() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        on_device_panic(|sentence| {
            let _ = FIRST.set(sentence);
        });
    });
}

/// What [`keep_device_panic`] has kept: after this no result of a device is to be believed. To be asked after each
/// synchronisation; the panic of a launch comes before what waits for it.
pub fn device_panic() -> Option<&'static str> {
    FIRST.get().map(String::as_str)
}

static FIRST: OnceLock<String> = OnceLock::new();

fn on_device_panic(act: impl Fn(String) + Send + Sync + 'static) {
    let before = take_hook();
    set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        match thread.name() {
            Some(name) if name.starts_with(DEVICE_THREAD) => {
                act(format!("the device's thread {name} panicked: {info}"));
            }
            _ => before(info),
        }
    }));
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use cubecl::prelude::*;
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

    use super::*;

    /// Names what a child of the test has to do.
    const CHILD: &str = "LOCKSTEP_TEST_GUARD";
    const ABORTED: i32 = 6;

    /// Changes a constant while it runs: its expansion panics.
    #[cube(launch)]
    fn broken_kernel(out: &mut Array<f32>, #[comptime] n: usize) {
        let mut left = n;
        while left > 0 {
            left /= 2;
        }
        out[0] = f32::cast_from(left);
    }

    fn launch_broken() -> f32 {
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        let out = client.create_from_slice(f32::as_bytes(&[-1.0]));
        // SAFETY: it has one float.
        let arg = unsafe { ArrayArg::from_raw_parts(out.clone(), 1) };
        let count = CubeCount::Static(1, 1, 1);
        broken_kernel::launch::<WgpuRuntime>(&client, count, CubeDim::new_1d(1), arg, 8);
        cubecl::future::block_on(client.sync()).unwrap();
        f32::from_bytes(&client.read_one(out).unwrap())[0]
    }

    fn child(what: &str) -> Output {
        let name = "cube::guard::tests::a_kernel_that_cannot_be_made_ends_the_process";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture"]).env(CHILD, what).output().unwrap()
    }

    #[test]
    fn a_kernel_that_cannot_be_made_ends_the_process() {
        if let Ok(what) = std::env::var(CHILD) {
            match &what[..] {
                "aborting" => abort_on_device_panic(),
                "keeping" => keep_device_panic(),
                _ => {}
            }
            println!("went on with {}, {:?}", launch_broken(), device_panic());
            return;
        }
        let unguarded = child("unguarded");
        let out = String::from_utf8_lossy(&unguarded.stdout);
        assert!(unguarded.status.success() && out.contains("went on with -1, None"), "{unguarded:?}");
        let keeping = child("keeping");
        let out = String::from_utf8_lossy(&keeping.stdout);
        let kept = "went on with -1, Some(\"the device's thread DSD-";
        assert!(keeping.status.success() && out.contains(kept), "{keeping:?}");
        let guarded = child("aborting");
        let out = String::from_utf8_lossy(&guarded.stdout);
        let errors = String::from_utf8_lossy(&guarded.stderr);
        assert_eq!(guarded.status.signal(), Some(ABORTED), "{guarded:?}");
        assert!(!out.contains("went on") && errors.contains("the device's thread DSD-"), "{guarded:?}");
    }
}
