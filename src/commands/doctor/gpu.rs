//! What there is of NVIDIA's: driver, devices, libraries. A build without CUDA only looks at files; one with it loads the
//! libraries and asks them, as a worker would.

use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};

use super::Check;

const DRIVER: &str = "/proc/driver/nvidia";

/// Where the dynamic loader looks without being told, on the distributions there are.
const STANDARD_FOLDERS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/lib64",
    "/usr/local/lib",
];

pub(super) fn checks() -> Vec<Check> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let toolkits: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| variable(name).map(PathBuf::from))
        .chain([PathBuf::from("/usr/local/cuda")])
        .collect();
    let mut folders: Vec<PathBuf> = variable("LD_LIBRARY_PATH")
        .map(|paths| std::env::split_paths(&paths).filter(|path| path.is_absolute()).collect())
        .unwrap_or_default();
    folders.extend(toolkits.iter().flat_map(|toolkit| ["lib64", "lib"].map(|name| toolkit.join(name))));
    folders.extend(configured_folders(Path::new("/etc/ld.so.conf.d")));
    folders.extend(STANDARD_FOLDERS.map(PathBuf::from));

    let mut checks = loaded::checks();
    // What was loaded needs no search for its file.
    let files = vec![driver(Path::new(DRIVER)), devices(Path::new(DRIVER))];
    let files =
        files.into_iter().chain(["libcuda", "libnvrtc", "libnccl"].map(|name| library(name, &folders)));
    for check in files.chain([headers(&toolkits)]) {
        if !checks.iter().any(|known| known.name == check.name) {
            checks.push(check);
        }
    }
    checks
}

/// What this build would use of it.
#[cfg(not(feature = "cuda"))]
mod loaded {
    use super::super::Check;

    pub(super) fn checks() -> Vec<Check> {
        vec![Check::ok("gpu", "not used: this build computes on the CPU")]
    }
}

/// What this build would use of it, as the libraries themselves say.
#[cfg(feature = "cuda")]
mod loaded {
    use kernels::cuda::{Cuda, CudaGpu, devices, headers, nvrtc_version};
    use kernels::nccl::{Library, NcclLibrary};

    use super::super::{Check, bytes};

    pub(super) fn checks() -> Vec<Check> {
        let mut checks = vec![match Cuda::look() {
            Ok(cuda) => Check::ok("gpu", format!("CUDA can be used: {}", cuda.bits(0))),
            Err(missing) => Check::note("gpu", format!("not used: {missing}")).hint(missing.hint()),
        }];
        if let Ok(devices) = devices() {
            let shown: Vec<String> =
                devices.iter().zip(0..).map(|(gpu, ordinal)| device(ordinal, gpu)).collect();
            checks.push(Check::ok("gpu devices", shown.join("; ")));
        }
        checks.push(match nvrtc_version() {
            Some((major, minor)) => Check::ok("libnvrtc", format!("NVRTC {major}.{minor}")),
            None => Check::note("libnvrtc", "cannot be loaded")
                .hint("install the CUDA toolkit, and name its lib64 in LD_LIBRARY_PATH"),
        });
        checks.push(match headers() {
            Ok(folder) => Check::ok("cuda headers", folder.display().to_string()),
            Err(missing) => Check::note("cuda headers", missing.to_string()).hint(missing.hint()),
        });
        checks.push(match Library::load() {
            Ok(nccl) => Check::ok("libnccl", format!("NCCL {} in {}", nccl.version(), nccl.path())),
            Err(error) => Check::note("libnccl", error.to_string()).hint(
                "without it gradients travel between GPUs through the host's memory: the same bits, slower",
            ),
        });
        checks
    }

    fn device(ordinal: usize, gpu: &CudaGpu) -> String {
        let CudaGpu { name, memory_bytes, capability: (major, minor), .. } = gpu;
        format!("cuda:{ordinal} {name}, {}, compute capability {major}.{minor}", bytes(*memory_bytes))
    }
}

fn driver(folder: &Path) -> Check {
    let path = folder.join("version");
    match read_to_string(&path) {
        Ok(text) => Check::ok("gpu driver", driver_version(&text).unwrap_or("of unknown version")),
        Err(_) => Check::note("gpu driver", format!("none: there is no {}", path.display())),
    }
}

/// The first word that is a version: the text around it differs between open and closed drivers.
fn driver_version(text: &str) -> Option<&str> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|char| char.is_ascii_digit() || char == '.');
    text.lines().next()?.split_whitespace().find(is_version)
}

fn devices(folder: &Path) -> Check {
    let entries = read_dir(folder.join("gpus")).into_iter().flatten().flatten();
    let mut models: Vec<String> = entries
        .filter_map(|entry| {
            let text = read_to_string(entry.path().join("information")).ok()?;
            let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(model.trim().to_owned())
        })
        .collect();
    models.sort();
    match models.is_empty() {
        true => Check::note("gpu devices", "none that a driver knows"),
        false => Check::ok("gpu devices", format!("{}: {}", models.len(), models.join(", "))),
    }
}

/// The first file of this name in these folders, whatever its version.
fn library(name: &'static str, folders: &[PathBuf]) -> Check {
    let prefix = format!("{name}.so");
    let found = folders.iter().find_map(|folder| {
        let names = read_dir(folder).ok()?.flatten().map(|entry| entry.file_name());
        let name = names.filter(|name| name.to_string_lossy().starts_with(&prefix)).min()?;
        Some(folder.join(name))
    });
    match found {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => {
            Check::note(name, "not in LD_LIBRARY_PATH, CUDA_HOME, /etc/ld.so.conf.d or the system's folders")
        }
    }
}

/// The compiler that makes kernels at run time reads them.
fn headers(toolkits: &[PathBuf]) -> Check {
    let folders: Vec<PathBuf> = toolkits
        .iter()
        .map(|toolkit| toolkit.join("include"))
        .chain([PathBuf::from("/usr/include")])
        .collect();
    match folders.iter().find(|folder| folder.join("cuda_runtime.h").is_file()) {
        Some(folder) => Check::ok("cuda headers", folder.display().to_string()),
        None => {
            let looked_at: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
            Check::note("cuda headers", format!("no cuda_runtime.h in {}", looked_at.join(", ")))
        }
    }
}

/// The folders that the files of the dynamic loader's configuration name.
fn configured_folders(configuration: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        read_dir(configuration).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let texts = files.iter().filter_map(|file| read_to_string(file).ok());
    texts
        .flat_map(|text| text.lines().map(|line| PathBuf::from(line.trim())).collect::<Vec<_>>())
        .filter(|path| path.is_absolute())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Finding;
    use super::*;
    use std::fs::{create_dir_all, write};

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

    #[test]
    fn what_is_there_is_found_and_what_is_not_is_noted() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("nvidia");
        assert_eq!(driver(&folder).finding, Finding::Note);
        assert_eq!(devices(&folder).finding, Finding::Note);
        for (number, model) in [("0", "Some GPU"), ("1", "Some GPU")] {
            let gpu = folder.join("gpus").join(number);
            create_dir_all(&gpu).unwrap();
            write(gpu.join("information"), format!("Model: \t\t {model}\nIRQ: 1\n")).unwrap();
        }
        write(folder.join("version"), "NVRM version: NVIDIA 1.2.3\n").unwrap();
        assert_eq!(driver(&folder), Check::ok("gpu driver", "1.2.3"));
        assert_eq!(devices(&folder), Check::ok("gpu devices", "2: Some GPU, Some GPU"));

        let lib = root.path().join("lib");
        create_dir_all(&lib).unwrap();
        assert_eq!(library("libnccl", std::slice::from_ref(&lib)).finding, Finding::Note);
        write(lib.join("libnccl.so.2.21"), "").unwrap();
        write(lib.join("libnccl.so.2"), "").unwrap();
        let found = library("libnccl", &[root.path().join("none"), lib.clone()]);
        assert_eq!(found.text, lib.join("libnccl.so.2").display().to_string());

        assert_eq!(headers(&[root.path().to_owned()]).finding, Finding::Note);
        create_dir_all(root.path().join("include")).unwrap();
        write(root.path().join("include/cuda_runtime.h"), "").unwrap();
        assert_eq!(headers(&[root.path().to_owned()]).finding, Finding::Ok);
    }

    #[test]
    fn the_loaders_configuration_names_folders() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path().join("a.conf"), "# a comment\n/opt/a/lib\n  /opt/b/lib \nrelative\n").unwrap();
        assert_eq!(
            configured_folders(dir.path()),
            [PathBuf::from("/opt/a/lib"), PathBuf::from("/opt/b/lib")]
        );
        assert!(configured_folders(&dir.path().join("none")).is_empty());
    }
}
