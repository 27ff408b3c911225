//! This process's memory, as the kernel tells it.

use std::fs;

/// Memory around a network's run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Resident {
    /// Most that was resident at once since before loading, mapped weights included, bytes.
    pub peak_bytes: u64,
    /// Of that what was there before loading, bytes.
    pub before_bytes: u64,
    /// Resident and not backed by a file after the run: what cannot be reclaimed, bytes.
    pub anonymous_bytes: u64,
}

/// A measurement under way.
#[derive(Debug)]
pub struct Watch {
    before_bytes: u64,
}

impl Watch {
    /// Starts measuring; the kernel's high-water mark starts anew where it lets us.
    #[must_use]
    pub fn start() -> Watch {
        // Without that right the peak is the whole process's so far, which is no less than the truth.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Watch {
            before_bytes: field("/proc/self/status", "VmRSS:"),
        }
    }

    /// Resident now and not backed by a file, bytes.
    #[must_use]
    pub fn anonymous_bytes() -> u64 {
        field("/proc/self/smaps_rollup", "Anonymous:")
    }

    /// What was measured; zeros where the kernel does not tell.
    #[must_use]
    pub fn stop(self) -> Resident {
        Resident {
            peak_bytes: field("/proc/self/status", "VmHWM:"),
            before_bytes: self.before_bytes,
            anonymous_bytes: Watch::anonymous_bytes(),
        }
    }
}

fn field(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
