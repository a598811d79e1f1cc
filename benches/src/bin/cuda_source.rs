//! `lockstep-cuda-source`: the CUDA C++ of every kernel, as JSON, one object a line. It launches them on a device that
//! only keeps their source; `scripts/cuda-check` compiles what this prints.

use cubecl::Runtime;
use cubecl::future::block_on;
use kernels::cube::guard::abort_on_device_panic;
use kernels::cube::roofline;
use kernels::cube::source::{Architecture, KernelSource, SourceDevice, SourceRuntime, launched};
use serde_json::json;

fn main() {
    abort_on_device_panic();
    for architecture in Architecture::ALL {
        let client = SourceRuntime::client(&SourceDevice(architecture));
        roofline::multiply_add(&client, 1, 1);
        let buffer = client.empty(4 * size_of::<f32>());
        roofline::copy(&client, &buffer, &buffer, 4);
        block_on(client.sync()).expect("nothing is executed");
    }
    for KernelSource { architecture, entry, id, units, shared_bytes, text } in launched() {
        let architecture = architecture.name();
        println!(
            "{}",
            json!({
                "architecture": architecture,
                "entry": entry,
                "id": id,
                "units": units,
                "shared_bytes": shared_bytes,
                "text": text,
            })
        );
    }
}
