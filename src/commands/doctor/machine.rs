//! Processor, cores and memory.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use kernels::Simd;

use super::{Check, bytes};
use crate::args::cores;

/// The smallest presets train in a fraction of this.
const LITTLE_MEMORY_BYTES: u64 = 512 << 20;

pub(super) fn checks() -> Vec<Check> {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let levels: Vec<String> = Simd::available().iter().map(Simd::to_string).collect();
    vec![
        cpu(model(&cpuinfo), &levels, has_fma()),
        usable_cores(cores(), cpuinfo.lines().filter(|line| line.starts_with("processor")).count()),
        memory(),
    ]
}

fn cpu(model: Option<&str>, levels: &[String], has_fma: bool) -> Check {
    let (model, used) = (model.unwrap_or("of unknown model"), &levels[0]);
    let fma = if has_fma { "with FMA" } else { "without FMA" };
    let text = format!("{model}, {fma}; vector level {used}, of {}", levels.join(", "));
    if used == "portable" && cfg!(target_arch = "x86_64") {
        let hint =
            "without AVX2 and FMA each multiply-add is a library call: the same bits, many times slower";
        return Check::note("cpu", text).hint(hint);
    }
    Check::ok("cpu", text)
}

fn model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim()).filter(|model| !model.is_empty())
}

#[cfg(target_arch = "x86_64")]
fn has_fma() -> bool {
    std::arch::is_x86_feature_detected!("fma")
}

/// It is part of every other supported instruction set.
#[cfg(not(target_arch = "x86_64"))]
fn has_fma() -> bool {
    true
}

/// `usable` respects affinity and the quota of a cgroup.
fn usable_cores(usable: usize, online: usize) -> Check {
    if usable >= online {
        return Check::ok("cores", format!("{usable}"));
    }
    let text = format!("{usable} of {online}: affinity or the quota of a cgroup holds the rest back");
    Check::note("cores", text).hint("--threads sets how many each worker uses")
}

fn memory() -> Check {
    let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(available)) =
        (kilobytes(&meminfo, "MemTotal"), kilobytes(&meminfo, "MemAvailable"))
    else {
        return Check::note("memory", "unknown: /proc/meminfo does not say");
    };
    let limit = limit_files(&read_to_string("/proc/self/cgroup").unwrap_or_default())
        .iter()
        .filter_map(|file| read_to_string(file).ok()?.trim().parse().ok())
        .min()
        .filter(|limit| *limit < total);
    judged_memory(total, available, limit)
}

fn judged_memory(total: u64, available: u64, limit: Option<u64>) -> Check {
    let mut text = format!("{} available of {}", bytes(available), bytes(total));
    if let Some(limit) = limit {
        text += &format!(", {} allowed by the cgroup", bytes(limit));
    }
    if available.min(limit.unwrap_or(u64::MAX)) < LITTLE_MEMORY_BYTES {
        return Check::note("memory", text)
            .hint("fewer --workers, a smaller batch_size or hidden_size need less");
    }
    Check::ok("memory", text)
}

/// A value of `/proc/meminfo` in bytes.
fn kilobytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Where the memory limits of this process's cgroup and of those above it are written, in either version of cgroups.
fn limit_files(cgroup: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in cgroup.lines() {
        let (root, file, path) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "", path] => ("/sys/fs/cgroup", "memory.max", path),
            [_, controllers, path] if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", path)
            }
            _ => continue,
        };
        let own = Path::new(root).join(path.trim_start_matches('/'));
        files.extend(own.ancestors().take_while(|dir| dir.starts_with(root)).map(|dir| dir.join(file)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::super::Finding;
    use super::*;

    #[test]
    fn the_processor_is_named_with_the_level_that_is_used() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\n";
        assert_eq!(model(cpuinfo), Some("Some CPU @ 2 GHz"));
        assert_eq!(model("processor\t: 0\n"), None);
        let levels = ["avx2".to_owned(), "portable".to_owned()];
        let check = cpu(model(cpuinfo), &levels, true);
        assert_eq!(check.text, "Some CPU @ 2 GHz, with FMA; vector level avx2, of avx2, portable");
        assert_eq!(check.finding, Finding::Ok);
        let slow = cpu(None, &levels[1..], false);
        assert_eq!(slow.hint.is_some(), cfg!(target_arch = "x86_64"));
        assert!(slow.text.starts_with("of unknown model, without FMA"), "{}", slow.text);
    }

    #[test]
    fn cores_that_are_held_back_are_noted() {
        assert_eq!(usable_cores(8, 8), Check::ok("cores", "8"));
        assert_eq!(usable_cores(8, 0).finding, Finding::Ok, "where /proc/cpuinfo lists none");
        let check = usable_cores(2, 64);
        assert!(check.finding == Finding::Note && check.text.starts_with("2 of 64"), "{check:?}");
    }

    #[test]
    fn memory_is_what_the_cgroup_leaves_of_it() {
        let meminfo = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n";
        assert_eq!(kilobytes(meminfo, "MemTotal"), Some(16_384_000_000));
        assert_eq!(kilobytes(meminfo, "Mem"), None);
        assert_eq!(
            judged_memory(16 << 30, 8 << 30, None),
            Check::ok("memory", "8.0 GiB available of 16.0 GiB")
        );
        let limited = judged_memory(16 << 30, 8 << 30, Some(256 << 20));
        assert_eq!(limited.text, "8.0 GiB available of 16.0 GiB, 256.0 MiB allowed by the cgroup");
        assert_eq!(limited.finding, Finding::Note);
    }

    #[test]
    fn limits_of_both_versions_of_cgroups_are_looked_for_up_to_the_root() {
        let files = |cgroup: &str| -> Vec<String> {
            limit_files(cgroup).iter().map(|file| file.display().to_string()).collect()
        };
        assert_eq!(files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        assert_eq!(
            files("0::/user.slice/a:b\n"),
            [
                "/sys/fs/cgroup/user.slice/a:b/memory.max",
                "/sys/fs/cgroup/user.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            files("5:cpu,memory:/docker\n4:pids:/docker\n"),
            [
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes"
            ]
        );
    }
}
