//! Processor, cores and memory.

use std::fs::read_to_string;

use kernels::Simd;

use super::{Check, bytes};
use crate::args::cores;
use crate::memory::{available_bytes, total_bytes};

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
    match (total_bytes(), available_bytes()) {
        (Some(total), Some(available)) => judged_memory(total, available),
        _ => Check::note("memory", "unknown: /proc/meminfo does not say"),
    }
}

/// `available` is what `train` measures its estimate against.
fn judged_memory(total: u64, available: u64) -> Check {
    let text = format!("{} available of {}", bytes(available), bytes(total));
    if available < LITTLE_MEMORY_BYTES {
        return Check::note("memory", text)
            .hint("fewer --workers, a smaller batch_size or hidden_size need less");
    }
    Check::ok("memory", text)
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
    fn little_memory_is_noted() {
        assert_eq!(judged_memory(16 << 30, 8 << 30), Check::ok("memory", "8.0 GiB available of 16.0 GiB"));
        let little = judged_memory(16 << 30, 256 << 20);
        assert_eq!(
            (little.text.as_str(), little.finding),
            ("256.0 MiB available of 16.0 GiB", Finding::Note)
        );
    }
}
