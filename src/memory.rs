//! How much memory there is, and how much this process may still take: what the machine has, and what its control
//! group leaves it.

use std::path::{Path, PathBuf};

/// Bytes of the machine; `None` where nobody says, as on systems other than Linux.
pub(crate) fn total_bytes() -> Option<u64> {
    in_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Bytes that can still be taken without swapping; `None` as above.
pub(crate) fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok();
    let machine = meminfo.and_then(|text| in_meminfo(&text, "MemAvailable:"));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = control_groups(&groups).filter_map(|(folder, version)| left_in(&folder, version)).min();
    machine.into_iter().chain(group).min()
}

/// A value of `/proc/meminfo` in bytes.
fn in_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Names of the files that a control group limits memory with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The folders of the control groups of `/proc/self/cgroup`, each with those above it: any may have a limit. (In a
/// container the path may be the host's, and only the topmost folder be there.)
fn control_groups(text: &str) -> impl Iterator<Item = (PathBuf, Version)> + '_ {
    text.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next(), fields.next().unwrap_or_default());
        let found = match controllers {
            Some("") => Some((Path::new("/sys/fs/cgroup"), Version::Two)),
            Some(names) if names.split(',').any(|name| name == "memory") => {
                Some((Path::new("/sys/fs/cgroup/memory"), Version::One))
            }
            _ => None,
        };
        let relative = Path::new(path).strip_prefix("/").unwrap_or(Path::new(""));
        found.into_iter().flat_map(move |(root, version)| {
            relative.ancestors().map(move |folder| (root.join(folder), version))
        })
    })
}

/// What the control group of this folder leaves: its limit less what it uses, but for the files that it would drop.
fn left_in(folder: &Path, version: Version) -> Option<u64> {
    let (limit, usage, reclaimable) = match version {
        Version::One => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        Version::Two => ("memory.max", "memory.current", "inactive_file "),
    };
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    let limit = number(limit)?;
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let files =
        stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(number(usage)?.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24684096 kB\nMemAvailable:   23193972 kB\n";
        assert_eq!(in_meminfo(text, "MemAvailable:"), Some(23_193_972 * 1024));
        assert_eq!(in_meminfo(text, "MemTotal:"), Some(24_684_096 * 1024));
        assert_eq!(in_meminfo("MemTotal: 3 kB\n", "MemAvailable:"), None);
    }

    #[test]
    fn control_groups_are_found_with_those_above() {
        let found: Vec<_> = control_groups("4:cpu,memory:/a/b\n3:cpu:/c\n0::/d\n").collect();
        let expected = [
            ("/sys/fs/cgroup/memory/a/b", Version::One),
            ("/sys/fs/cgroup/memory/a", Version::One),
            ("/sys/fs/cgroup/memory/", Version::One),
            ("/sys/fs/cgroup/d", Version::Two),
            ("/sys/fs/cgroup/", Version::Two),
        ];
        assert_eq!(found, expected.map(|(path, version)| (PathBuf::from(path), version)));
        assert_eq!(control_groups("nonsense\n\n").count(), 0);
    }

    #[test]
    fn a_limit_leaves_what_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(left_in(dir.path(), Version::Two), None);
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(left_in(dir.path(), Version::Two), None);
        write("memory.max", "1000\n");
        assert_eq!(left_in(dir.path(), Version::Two), Some(300));
        write("memory.stat", "anon 1\ninactive_file 200\nactive_file 9\n");
        assert_eq!(left_in(dir.path(), Version::Two), Some(500));
        write("memory.current", "9000\n");
        assert_eq!(left_in(dir.path(), Version::Two), Some(0));
        write("memory.limit_in_bytes", "100\n");
        write("memory.usage_in_bytes", "40\n");
        assert_eq!(left_in(dir.path(), Version::One), Some(60));
    }
}
