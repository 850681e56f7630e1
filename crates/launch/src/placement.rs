//! Where the processes of a run would run, and how much memory they find there, without starting any.

use procfs::Current;
use serde::Serialize;
use unveil_config::Config;

use crate::LaunchError;
use crate::gpus;
use crate::train::assign_gpus;

/// A process of stage 2 and its GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlacedProcess {
    /// Name of the process: `learner`, `learner-1`, …, `rollout-0`, …
    pub process: String,
    /// GPU as `CUDA_VISIBLE_DEVICES` names it; `None` on CPUs.
    pub gpu: Option<String>,
}

/// Returns the processes of stage 2 with their GPUs, as `unveil train` would start them.
///
/// # Errors
/// Returns [`LaunchError::Gpus`] if there are fewer GPUs than processes and they must not be shared.
pub fn placement(config: &Config) -> Result<Vec<PlacedProcess>, LaunchError> {
    let (_, placement) = assign_gpus(config, false)?;
    let rank = |i: usize| if i == 0 { "learner".to_owned() } else { format!("learner-{i}") };
    let ranks = placement.ranks.iter().enumerate().map(|(i, gpu)| (rank(i), gpu));
    let workers = placement.workers.iter().enumerate().map(|(i, gpu)| (format!("rollout-{i}"), gpu));
    let id = |gpu: &Option<gpus::Gpu>| gpu.as_ref().map(|g| g.env_variable().1.to_owned());
    Ok(ranks.chain(workers).map(|(process, gpu)| PlacedProcess { process, gpu: id(gpu) }).collect())
}

/// Memory of this machine that a run on a device uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineMemory {
    /// Bytes of the smallest visible GPU.
    Gpu(u64),
    /// Bytes of host memory.
    Host(u64),
}

impl MachineMemory {
    /// Returns the memory for `run.device`; `None` if the device is a GPU and there is none, or if the memory is unknown.
    pub fn of(device: &str) -> Option<Self> {
        let gpu = if device == "cpu" { None } else { gpus::smallest_memory() };
        match gpu {
            Some(bytes) => Some(Self::Gpu(bytes)),
            None if device.starts_with("cuda") => None,
            None => procfs::Meminfo::current().ok().map(|m| Self::Host(m.mem_total)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_on_cpus_have_no_gpu() {
        let mut config = Config::default();
        config.run.device = "cpu".into();
        config.learner.parallel.ranks = 2;
        let placed = placement(&config).unwrap();
        let names: Vec<&str> = placed.iter().map(|p| p.process.as_str()).collect();
        assert_eq!(names, ["learner", "learner-1", "rollout-0"]);
        assert!(placed.iter().all(|p| p.gpu.is_none()));
        config.learner.steps = 0;
        assert_eq!(placement(&config).unwrap(), []);
    }

    #[test]
    fn host_memory_is_known() {
        let Some(MachineMemory::Host(bytes)) = MachineMemory::of("cpu") else { panic!("no host memory") };
        assert!(bytes > 1 << 28, "{bytes}");
    }
}
