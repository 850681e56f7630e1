//! Peak memory of this process and all its descendants: the highest sum of their proportional set sizes, sampled twice a second.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Samples the memory on a thread until dropped.
pub(crate) struct PeakMemory {
    peak_kib: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl PeakMemory {
    /// Starts sampling.
    pub fn start() -> Self {
        let peak_kib = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let peak = peak_kib.clone();
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                peak.fetch_max(total_pss_kib(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self { peak_kib, stop }
    }

    /// Returns the highest sum so far in MiB.
    pub fn peak_mib(&self) -> f64 {
        self.peak_kib.load(Ordering::Relaxed) as f64 / 1024.0
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn total_pss_kib() -> u64 {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()) {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut todo = vec![std::process::id()];
    let mut sum = 0;
    while let Some(pid) = todo.pop() {
        sum += pss_kib(pid).unwrap_or(0);
        todo.extend(children.remove(&pid).unwrap_or_default());
    }
    sum
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn pss_kib(pid: u32) -> Option<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    rollup.lines().find_map(|l| l.strip_prefix("Pss:"))?.trim().trim_end_matches("kB").trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_is_counted() {
        let before = super::total_pss_kib();
        let block = vec![1u8; 64 << 20];
        let after = super::total_pss_kib();
        assert!(before > 0 && after > before + 60 * 1024, "{before} {after} {}", block.len());
    }
}
