//! Assignment of GPUs to the processes of a run: the learner's ranks first, then the workers. `CUDA_VISIBLE_DEVICES` limits each process
//! to its GPU, and also determines which GPUs the run may use.

use std::path::Path;

use libloading::os::unix::{Library, RTLD_NOW};

use crate::LaunchError;

/// Library of the driver.
const DRIVER: &str = "libcuda.so.1";
/// Environment variable that limits the GPUs that CUDA sees.
pub(crate) const VISIBLE_DEVICES: &str = "CUDA_VISIBLE_DEVICES";

/// The GPUs of a run, as `CUDA_VISIBLE_DEVICES` names them; empty if it runs on CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Gpus {
    ids: Vec<String>,
    /// Whether the configuration selects the GPU by its number among all, which is wrong for a process that sees only that one.
    numbered: bool,
}

/// The GPU of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gpu {
    id: String,
    numbered: bool,
}

impl Gpu {
    /// Returns the environment variable of the process.
    pub(crate) fn env_variable(&self) -> (&'static str, &str) {
        (VISIBLE_DEVICES, &self.id)
    }

    /// Returns the `--set` option that the process needs, if any.
    pub(crate) fn config_override(&self) -> Option<&'static str> {
        self.numbered.then_some("run.device=cuda")
    }
}

impl Gpus {
    /// Finds the GPUs for `run.device`; `visible` is the value of `CUDA_VISIBLE_DEVICES`, if it is set.
    ///
    /// # Errors
    /// Returns [`LaunchError::Gpus`] if the device is the number of a GPU that does not exist.
    pub(crate) fn detect(device: &str, visible: Option<&str>) -> Result<Self, LaunchError> {
        if device == "cpu" {
            return Ok(Self::default());
        }
        Self::from_count(device, visible, driver_gpu_count(Path::new(DRIVER)))
    }

    /// Works as [`Gpus::detect`] for a driver that reports `count` GPUs.
    pub(crate) fn from_count(device: &str, visible: Option<&str>, count: usize) -> Result<Self, LaunchError> {
        let name = |i: usize| visible.and_then(|v| v.split(',').nth(i)).map(|id| id.trim().to_owned());
        let ids: Vec<String> = (0..count).map(|i| name(i).unwrap_or_else(|| i.to_string())).collect();
        let Some(number) = device.strip_prefix("cuda:") else { return Ok(Self { ids, numbered: false }) };
        // The role itself rejects an invalid number, and a GPU without a driver.
        match number.parse::<usize>() {
            Ok(n) if n < count => Ok(Self { ids: vec![ids[n].clone()], numbered: true }),
            Ok(_) if count > 0 => {
                let seen = visible.map(|v| format!(" ({VISIBLE_DEVICES} is `{v}`)")).unwrap_or_default();
                Err(LaunchError::Gpus(format!("run.device is `{device}`, but there are {count} GPU(s){seen}")))
            }
            _ => Ok(Self::default()),
        }
    }

    /// Returns the GPU for a process that runs alone.
    pub(crate) fn first(&self) -> Option<Gpu> {
        self.for_process(0)
    }

    fn for_process(&self, process: usize) -> Option<Gpu> {
        let id = self.ids.get(process % self.ids.len().max(1))?;
        Some(Gpu { id: id.clone(), numbered: self.numbered })
    }

    /// Assigns GPUs to the ranks of stage 1; with `share` several ranks may get the same one.
    ///
    /// # Errors
    /// Returns [`LaunchError::Gpus`] if there are fewer GPUs than ranks and they must not be shared.
    pub(crate) fn assign_stage_1(&self, ranks: usize, share: bool) -> Result<Vec<Option<Gpu>>, LaunchError> {
        let have = self.ids.len();
        if have > 0 && have < ranks && !share {
            return Err(LaunchError::Gpus(format!(
                "stage 1 has {ranks} ranks that each need a GPU, and there are {have} ({}). Lower sft.parallel.ranks, or set \
                 launch.share_gpus = true to run several processes on one GPU",
                self.ids.join(", ")
            )));
        }
        Ok((0..ranks).map(|rank| self.for_process(rank)).collect())
    }

    /// Assigns GPUs to the learner's ranks and to the workers; with `share` several processes may get the same one.
    ///
    /// # Errors
    /// Returns [`LaunchError::Gpus`] if there are fewer GPUs than processes and they must not be shared.
    pub(crate) fn assign(&self, ranks: usize, workers: usize, share: bool) -> Result<Placement, LaunchError> {
        let have = self.ids.len();
        let need = ranks + workers;
        if have > 0 && have < need && !share {
            let only = if self.numbered { "run.device names one GPU" } else { "this machine has fewer" };
            return Err(LaunchError::Gpus(format!(
                "stage 2 has {need} processes that each need a GPU ({ranks} rank(s) of the learner, {workers} rollout worker(s)), and {only}: \
                 {have} ({}). Lower learner.parallel.ranks or rollout.workers, or set launch.share_gpus = true to run several processes \
                 on one GPU: each measures the free memory when it starts, so limit the workers by rollout.memory_gib then",
                self.ids.join(", ")
            )));
        }
        let assigned = |range: std::ops::Range<usize>| range.map(|p| self.for_process(p)).collect();
        Ok(Placement { ranks: assigned(0..ranks), workers: assigned(ranks..need), idle: have.saturating_sub(need) })
    }
}

/// The GPU of each process of stage 2; `None` on CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    pub ranks: Vec<Option<Gpu>>,
    pub workers: Vec<Option<Gpu>>,
    idle: usize,
}

impl Placement {
    /// Describes the assignment in one line; `None` on CPUs.
    pub(crate) fn describe(&self) -> Option<String> {
        let rank = |i: usize| if i == 0 { "learner".to_owned() } else { format!("learner-{i}") };
        let ranks = self.ranks.iter().enumerate().map(|(i, g)| (rank(i), g));
        let workers = self.workers.iter().enumerate().map(|(i, g)| (format!("rollout-{i}"), g));
        let each: Vec<String> = ranks
            .chain(workers)
            .filter_map(|(role, gpu)| gpu.as_ref().map(|g| format!("{role} on {}", g.id)))
            .collect();
        let idle = match self.idle {
            0 => String::new(),
            n => format!("; {n} GPU(s) are not used (rollout.workers, learner.parallel.ranks)"),
        };
        (!each.is_empty()).then(|| format!("GPUs: {}{idle}", each.join(", ")))
    }
}

/// Returns the number of GPUs that the driver shows this process; 0 without a driver.
#[expect(unsafe_code, reason = "calls the CUDA driver, which is a C library")]
fn driver_gpu_count(driver: &Path) -> usize {
    type Init = unsafe extern "C" fn(u32) -> i32;
    type Count = unsafe extern "C" fn(*mut i32) -> i32;
    let mut count = 0;
    // SAFETY: both symbols have these signatures in every version of the driver; neither creates a context, and the library stays loaded,
    // as it is supposed to.
    let status = unsafe {
        let Ok(library) = Library::open(Some(driver), RTLD_NOW) else { return 0 };
        let library = std::mem::ManuallyDrop::new(library);
        match (library.get::<Init>(b"cuInit"), library.get::<Count>(b"cuDeviceGetCount")) {
            (Ok(init), Ok(ask)) if init(0) == 0 => ask(&raw mut count),
            _ => return 0,
        }
    };
    if status == 0 { usize::try_from(count).unwrap_or(0) } else { 0 }
}

/// Returns the memory in bytes of the smallest GPU that the driver shows this process; `None` without a driver or a GPU.
pub(crate) fn smallest_memory() -> Option<u64> {
    driver_smallest_memory(Path::new(DRIVER))
}

#[expect(unsafe_code, reason = "calls the CUDA driver, which is a C library")]
fn driver_smallest_memory(driver: &Path) -> Option<u64> {
    type Total = unsafe extern "C" fn(*mut usize, i32) -> i32;
    let count = driver_gpu_count(driver);
    // SAFETY: the symbol has this signature in every version of the driver, which was initialised to count the GPUs; it needs no context,
    // and the library stays loaded.
    unsafe {
        let library = std::mem::ManuallyDrop::new(Library::open(Some(driver), RTLD_NOW).ok()?);
        let total = library.get::<Total>(b"cuDeviceTotalMem_v2").ok()?;
        let memory = |gpu: usize| {
            let mut bytes = 0;
            (total(&raw mut bytes, i32::try_from(gpu).ok()?) == 0).then_some(bytes as u64)
        };
        (0..count).filter_map(memory).min()
    }
}

#[cfg(test)]
mod tests {
    use unveil_testkit::FakeDriver;

    use super::*;

    fn ids(gpus: &[Option<Gpu>]) -> Vec<&str> {
        gpus.iter().flatten().map(|g| g.id.as_str()).collect()
    }

    #[test]
    fn ranks_come_first_then_workers() {
        let eight = Gpus::from_count("auto", None, 8).unwrap();
        let placed = eight.assign(2, 5, false).unwrap();
        assert_eq!((ids(&placed.ranks), ids(&placed.workers)), (vec!["0", "1"], vec!["2", "3", "4", "5", "6"]));
        let line = placed.describe().unwrap();
        assert!(line.contains("learner on 0, learner-1 on 1, rollout-0 on 2"), "{line}");
        assert!(line.contains("1 GPU(s) are not used"), "{line}");
        assert_eq!(eight.first().unwrap().env_variable(), (VISIBLE_DEVICES, "0"));
        assert_eq!(eight.first().unwrap().config_override(), None);
    }

    #[test]
    fn too_few_gpus_are_rejected_unless_shared() {
        let two = Gpus::from_count("cuda", None, 2).unwrap();
        let e = two.assign(1, 2, false).unwrap_err().to_string();
        for word in ["3 processes", "2 (0, 1)", "rollout.workers", "launch.share_gpus = true"] {
            assert!(e.contains(word), "{e}");
        }
        let placed = two.assign(1, 2, true).unwrap();
        assert_eq!((ids(&placed.ranks), ids(&placed.workers)), (vec!["0"], vec!["1", "0"]));
        // There is nothing to assign on a machine without GPUs.
        let none = Gpus::from_count("auto", None, 0).unwrap();
        assert_eq!((none.assign(1, 9, false).unwrap().describe(), none.first()), (None, None));
    }

    #[test]
    fn visible_devices_are_respected() {
        let some = Gpus::from_count("auto", Some("3, GPU-8a1f,6"), 3).unwrap();
        assert_eq!(ids(&some.assign(1, 2, false).unwrap().workers), ["GPU-8a1f", "6"]);
        // CUDA ends the list at the first device that does not exist.
        assert_eq!(Gpus::from_count("auto", Some("3,99,6"), 1).unwrap().ids, ["3"]);
        assert_eq!(Gpus::from_count("auto", Some(""), 0).unwrap(), Gpus::default());
    }

    #[test]
    fn numbered_gpu_is_one_of_the_visible_ones() {
        let one = Gpus::from_count("cuda:1", Some("3,5"), 2).unwrap();
        let gpu = one.first().unwrap();
        assert_eq!((gpu.env_variable().1, gpu.config_override()), ("5", Some("run.device=cuda")));
        assert!(one.assign(1, 1, false).unwrap_err().to_string().contains("run.device names one GPU"));
        let e = Gpus::from_count("cuda:2", Some("3,5"), 2).unwrap_err().to_string();
        assert!(e.contains("there are 2 GPU(s) (CUDA_VISIBLE_DEVICES is `3,5`)"), "{e}");
        assert_eq!(Gpus::from_count("cuda:x", None, 2).unwrap(), Gpus::default());
    }

    #[test]
    fn gpus_are_counted_by_the_driver() {
        let driver = FakeDriver::build(&[(1, 2), (3, 4), (5, 6)]);
        assert_eq!(driver_gpu_count(driver.library()), 3);
        assert_eq!(driver_gpu_count(Path::new("/nowhere/libcuda.so.1")), 0);
    }

    #[test]
    fn smallest_gpu_limits_a_plan() {
        let driver = FakeDriver::build(&[(1, 8 << 30), (3, 6 << 30), (5, 7 << 30)]);
        assert_eq!(driver_smallest_memory(driver.library()), Some(6 << 30));
        assert_eq!(driver_smallest_memory(Path::new("/nowhere/libcuda.so.1")), None);
    }
}
