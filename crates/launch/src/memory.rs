//! Peak memory of this process and all its descendants: the highest sum of their proportional set sizes, sampled twice a second.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use procfs::process::{Process, all_processes};

/// Samples the memory on a thread until dropped.
pub(crate) struct PeakMemory {
    peak_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl PeakMemory {
    /// Starts sampling.
    pub(crate) fn start() -> Self {
        let peak_bytes = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let peak = peak_bytes.clone();
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                peak.fetch_max(total_pss(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self { peak_bytes, stop }
    }

    /// Returns the highest sum so far in MiB.
    pub(crate) fn peak_mib(&self) -> f64 {
        self.peak_bytes.load(Ordering::Relaxed) as f64 / f64::from(1 << 20)
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Returns the sum of the proportional set sizes in bytes. Processes that end meanwhile, or that may not be read, are left out.
fn total_pss() -> u64 {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    // Each process is closed before the next is opened: there may be more of them than file descriptors.
    for process in all_processes().into_iter().flatten().flatten() {
        if let Ok(stat) = process.stat() {
            children.entry(stat.ppid).or_default().push(process.pid());
        }
    }
    let mut todo = vec![std::process::id().cast_signed()];
    let mut sum = 0;
    while let Some(pid) = todo.pop() {
        sum += pss(pid).unwrap_or(0);
        todo.extend(children.remove(&pid).unwrap_or_default());
    }
    sum
}

/// Returns the proportional set size of a process in bytes.
fn pss(pid: i32) -> Option<u64> {
    let rollup = Process::new(pid).ok()?.smaps_rollup().ok()?;
    rollup.memory_map_rollup.iter().next()?.extension.map.get("Pss").copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_counted() {
        let before = total_pss();
        let block = vec![1u8; 64 << 20];
        let after = total_pss();
        assert!(before > 0 && after > before + (60 << 20), "{before} {after} {}", block.len());
    }

    #[test]
    fn process_that_has_ended_is_left_out() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        child.wait().unwrap();
        assert_eq!(pss(pid), None);
        assert!(total_pss() > 0);
    }
}
