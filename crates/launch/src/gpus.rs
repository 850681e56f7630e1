//! Which GPU each process of a run has: the learner's ranks first, then the workers. A process sees its own GPU only, by
//! `CUDA_VISIBLE_DEVICES`, which also says what the run itself may use.

use std::path::Path;

use libloading::os::unix::{Library, RTLD_NOW};

use crate::LaunchError;

/// The driver's own library.
const DRIVER: &str = "libcuda.so.1";
/// The variable by which CUDA is told what it may see.
pub(crate) const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// The GPUs of a run, as `CUDA_VISIBLE_DEVICES` names them; empty where it runs on CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Gpus {
    ids: Vec<String>,
    /// The device that the configuration names is a number among all GPUs, which a process that sees one of them must not be told.
    numbered: bool,
}

/// The GPU of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gpu {
    id: String,
    numbered: bool,
}

impl Gpu {
    /// What the process's environment has.
    pub fn variable(&self) -> (&'static str, &str) {
        (VISIBLE, &self.id)
    }

    /// The option that the process needs besides.
    pub fn set(&self) -> Option<&'static str> {
        self.numbered.then_some("run.device=cuda")
    }
}

impl Gpus {
    /// What `run.device` stands for here, where `visible` is the value of `CUDA_VISIBLE_DEVICES`, if it is set.
    ///
    /// # Errors
    /// It names a GPU by a number that there is none of.
    pub fn find(device: &str, visible: Option<&str>) -> Result<Self, LaunchError> {
        if device == "cpu" {
            return Ok(Self::default());
        }
        Self::among(device, visible, count(Path::new(DRIVER)))
    }

    /// [`Gpus::find`] where the driver counts so many.
    pub(crate) fn among(device: &str, visible: Option<&str>, count: usize) -> Result<Self, LaunchError> {
        let name = |i: usize| visible.and_then(|v| v.split(',').nth(i)).map(|id| id.trim().to_owned());
        let ids: Vec<String> = (0..count).map(|i| name(i).unwrap_or_else(|| i.to_string())).collect();
        let Some(number) = device.strip_prefix("cuda:") else { return Ok(Self { ids, numbered: false }) };
        // A word that is no number is the role's to refuse; so is a GPU where there is no driver.
        match number.parse::<usize>() {
            Ok(n) if n < count => Ok(Self { ids: vec![ids[n].clone()], numbered: true }),
            Ok(_) if count > 0 => {
                let seen = visible.map(|v| format!(" ({VISIBLE} is `{v}`)")).unwrap_or_default();
                Err(LaunchError::Gpus(format!("run.device is `{device}`, but there are {count} GPU(s){seen}")))
            }
            _ => Ok(Self::default()),
        }
    }

    /// The GPU of a process that has the machine to itself.
    pub fn first(&self) -> Option<Gpu> {
        self.of(0)
    }

    fn of(&self, process: usize) -> Option<Gpu> {
        let id = self.ids.get(process % self.ids.len().max(1))?;
        Some(Gpu { id: id.clone(), numbered: self.numbered })
    }

    /// The GPUs of the learner's ranks and of the workers; `share` lets several processes have one.
    ///
    /// # Errors
    /// There are fewer GPUs than processes, and they are not to be shared.
    pub fn place(&self, ranks: usize, workers: usize, share: bool) -> Result<Placement, LaunchError> {
        let (have, need) = (self.ids.len(), ranks + workers);
        if have > 0 && have < need && !share {
            let only = if self.numbered { "run.device names one GPU" } else { "this machine has fewer" };
            return Err(LaunchError::Gpus(format!(
                "stage 2 is {need} processes that each want a GPU ({ranks} rank(s) of the learner, {workers} rollout worker(s)), and {only}: \
                 {have} ({}). Lower learner.parallel.ranks or rollout.workers, or set launch.share_gpus = true to have several processes \
                 on one GPU: each counts what is free when it starts, so bound the workers by rollout.memory_gib then",
                self.ids.join(", ")
            )));
        }
        let of = |range: std::ops::Range<usize>| range.map(|p| self.of(p)).collect();
        Ok(Placement { ranks: of(0..ranks), workers: of(ranks..need), idle: have.saturating_sub(need) })
    }
}

/// What each process of stage 2 has; none on CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    pub ranks: Vec<Option<Gpu>>,
    pub workers: Vec<Option<Gpu>>,
    idle: usize,
}

impl Placement {
    /// One line for the person; none on CPUs.
    pub fn shown(&self) -> Option<String> {
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

/// GPUs that the driver shows this process; 0 where there is no driver.
#[allow(unsafe_code)]
fn count(driver: &Path) -> usize {
    type Init = unsafe extern "C" fn(u32) -> i32;
    type Count = unsafe extern "C" fn(*mut i32) -> i32;
    let mut count = 0;
    // SAFETY: both symbols have these signatures in every version of the driver; neither makes a context, and the library stays loaded,
    // as it is meant to.
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

#[cfg(test)]
mod tests {
    use unveil_testkit::FakeDriver;

    use super::*;

    fn ids(gpus: &[Option<Gpu>]) -> Vec<&str> {
        gpus.iter().flatten().map(|g| g.id.as_str()).collect()
    }

    #[test]
    fn ranks_come_first_then_workers() {
        let eight = Gpus::among("auto", None, 8).unwrap();
        let placed = eight.place(2, 5, false).unwrap();
        assert_eq!((ids(&placed.ranks), ids(&placed.workers)), (vec!["0", "1"], vec!["2", "3", "4", "5", "6"]));
        let shown = placed.shown().unwrap();
        assert!(shown.contains("learner on 0, learner-1 on 1, rollout-0 on 2"), "{shown}");
        assert!(shown.contains("1 GPU(s) are not used"), "{shown}");
        assert_eq!(eight.first().unwrap().variable(), (VISIBLE, "0"));
        assert_eq!(eight.first().unwrap().set(), None);
    }

    #[test]
    fn fewer_gpus_than_processes_are_refused_unless_shared() {
        let two = Gpus::among("cuda", None, 2).unwrap();
        let e = two.place(1, 2, false).unwrap_err().to_string();
        for said in ["3 processes", "2 (0, 1)", "rollout.workers", "launch.share_gpus = true"] {
            assert!(e.contains(said), "{e}");
        }
        let placed = two.place(1, 2, true).unwrap();
        assert_eq!((ids(&placed.ranks), ids(&placed.workers)), (vec!["0"], vec!["1", "0"]));
        // Nothing to place on a machine without GPUs.
        let none = Gpus::among("auto", None, 0).unwrap();
        assert_eq!((none.place(1, 9, false).unwrap().shown(), none.first()), (None, None));
    }

    #[test]
    fn what_is_visible_is_honoured() {
        let some = Gpus::among("auto", Some("3, GPU-8a1f,6"), 3).unwrap();
        assert_eq!(ids(&some.place(1, 2, false).unwrap().workers), ["GPU-8a1f", "6"]);
        // CUDA ends the list at the first that is not there.
        assert_eq!(Gpus::among("auto", Some("3,99,6"), 1).unwrap().ids, ["3"]);
        assert_eq!(Gpus::among("auto", Some(""), 0).unwrap(), Gpus::default());
    }

    #[test]
    fn a_numbered_gpu_is_one_of_the_visible_ones() {
        let one = Gpus::among("cuda:1", Some("3,5"), 2).unwrap();
        let gpu = one.first().unwrap();
        assert_eq!((gpu.variable().1, gpu.set()), ("5", Some("run.device=cuda")));
        assert!(one.place(1, 1, false).unwrap_err().to_string().contains("run.device names one GPU"));
        let e = Gpus::among("cuda:2", Some("3,5"), 2).unwrap_err().to_string();
        assert!(e.contains("there are 2 GPU(s) (CUDA_VISIBLE_DEVICES is `3,5`)"), "{e}");
        assert_eq!(Gpus::among("cuda:x", None, 2).unwrap(), Gpus::default());
    }

    #[test]
    fn the_driver_counts() {
        let driver = FakeDriver::build(&[(1, 2), (3, 4), (5, 6)]);
        assert_eq!(count(driver.library()), 3);
        assert_eq!(count(Path::new("/nowhere/libcuda.so.1")), 0);
    }
}
