//! Where the file of the library is. The dynamic loader is asked first; it does not look where Python packages put it.

use std::fs::read_dir;
use std::path::{Path, PathBuf};

/// Names a file of the library itself, instead of a search.
pub(super) const FILE: &str = "LOCKSTEP_NCCL";

/// Its name since version 2. Without the number it is there on machines that build against it only.
pub(super) const NAME: &str = "libnccl.so.2";

/// Below the folder of an environment of Python, what PyTorch's own NCCL is in.
const PACKAGE: &str = "nvidia/nccl/lib";

/// What to give the dynamic loader, in this order.
pub(super) fn candidates(variable: &impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    if let Some(file) = variable(FILE).filter(|file| !file.is_empty()) {
        return vec![PathBuf::from(file)];
    }
    let mut files = vec![PathBuf::from(NAME), PathBuf::from("libnccl.so")];
    let toolkits = ["NCCL_HOME", "CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(variable);
    for toolkit in toolkits.chain(["/usr/local/cuda".to_owned()]) {
        files.extend(["lib64", "lib"].map(|lib| Path::new(&toolkit).join(lib).join(NAME)));
    }
    if let Some(environment) = variable("VIRTUAL_ENV").or_else(|| variable("CONDA_PREFIX")) {
        files.extend(packages(&Path::new(&environment).join("lib")));
    }
    for system in ["/usr/local/lib", "/usr/lib"] {
        files.extend(packages(Path::new(system)));
    }
    files
}

/// The words in which a search that found nothing is told.
pub(super) fn looked_in() -> String {
    format!(
        "the dynamic loader's folders, NCCL_HOME, CUDA_PATH or Python's packages; {FILE} can name the file"
    )
}

/// `LIB/python3.N/{site,dist}-packages/nvidia/nccl/lib/libnccl.so.2`, newest Python first.
fn packages(lib: &Path) -> Vec<PathBuf> {
    let mut pythons: Vec<PathBuf> =
        read_dir(lib).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    pythons.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    pythons.sort_by_key(|path| {
        let digits: String = path.to_string_lossy().chars().rev().take_while(char::is_ascii_digit).collect();
        std::cmp::Reverse(digits.chars().rev().collect::<String>().parse::<u32>().unwrap_or(0))
    });
    let folders = pythons
        .iter()
        .flat_map(|python| ["site-packages", "dist-packages"].map(|packages| python.join(packages)));
    folders.map(|packages| packages.join(PACKAGE).join(NAME)).filter(|file| file.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_named_is_the_only_one() {
        let named = |name: &str| (name == FILE).then(|| "/opt/x.so".to_owned());
        assert_eq!(candidates(&named), [PathBuf::from("/opt/x.so")]);
    }

    #[test]
    fn the_loader_comes_first_and_python_last() {
        let root = std::env::temp_dir().join(format!("lockstep-nccl-search-{}", std::process::id()));
        for python in ["python3.9", "python3.12"] {
            let folder = root.join("lib").join(python).join("site-packages").join(PACKAGE);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(NAME), "").unwrap();
        }
        let environment = root.display().to_string();
        let found = candidates(&|name| (name == "VIRTUAL_ENV").then(|| environment.clone()));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(found[..2], [PathBuf::from(NAME), PathBuf::from("libnccl.so")]);
        let of_python: Vec<&PathBuf> = found.iter().filter(|path| path.starts_with(&root)).collect();
        assert_eq!(of_python.len(), 2);
        assert!(of_python[0].display().to_string().contains("python3.12"), "{of_python:?}");
    }
}
