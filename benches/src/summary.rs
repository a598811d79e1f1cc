//! What a measurement reports of its samples.

/// Order statistics of the times of single steps, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Number of steps.
    pub n: usize,
    /// Median: of an even number of steps the mean of the two in the middle.
    pub median_ms: f64,
    /// The fastest.
    pub min_ms: f64,
    /// Nine in ten were not slower.
    pub p90_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Summary {
    /// The summary of at least one time in seconds.
    pub fn of(seconds: impl Iterator<Item = f64>) -> Self {
        let mut ms: Vec<f64> = seconds.map(|seconds| 1e3 * seconds).collect();
        assert!(!ms.is_empty(), "summary: there are no times");
        ms.sort_unstable_by(f64::total_cmp);
        let n = ms.len();
        Self {
            n,
            median_ms: middle(&ms),
            min_ms: ms[0],
            p90_ms: ms[(9 * n).div_ceil(10) - 1],
            max_ms: ms[n - 1],
        }
    }
}

/// The median of at least one number: of an even count the mean of the two in the middle.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    assert!(!numbers.is_empty(), "median: there are no numbers");
    numbers.sort_unstable_by(f64::total_cmp);
    middle(&numbers)
}

fn middle(ordered: &[f64]) -> f64 {
    let n = ordered.len();
    (ordered[(n - 1) / 2] + ordered[n / 2]) / 2.0
}

/// Most memory that this process has held, in MiB; `None` where the system does not say.
pub fn peak_memory_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    kib.trim().strip_suffix("kB")?.trim().parse::<f64>().ok().map(|kib| kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics_of_few_and_many() {
        let of = |ms: &[u32]| Summary::of(ms.iter().map(|&ms| f64::from(ms) / 1e3));
        let one = of(&[3]);
        assert_eq!((one.median_ms, one.min_ms, one.p90_ms, one.max_ms), (3.0, 3.0, 3.0, 3.0));
        let ten = of(&[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!((ten.n, ten.median_ms, ten.min_ms, ten.p90_ms, ten.max_ms), (10, 5.5, 1.0, 9.0, 10.0));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_holds_some_memory() {
        assert!(peak_memory_mib().unwrap() > 0.5);
    }
}
