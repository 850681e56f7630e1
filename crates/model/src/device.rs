//! The device that a configuration names. Loads libtorch's CUDA half at run time, so that one build serves hosts with and
//! without a GPU.

use libloading::os::unix::{Library, RTLD_NOW};
use tch::Device;
use unveil_torch_ext::load_cuda;

use crate::{ModelError, Result};

/// The driver's own library.
const DRIVER: &str = "libcuda.so.1";

/// `cpu`; `auto`: the first GPU where one is usable, else the CPU; `cuda` or `cuda:N`: that GPU.
///
/// # Errors
/// A GPU is named that is not usable (the message says why), or the word is not known.
pub fn device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" => return Ok(if load_cuda().is_ok() { Device::cuda_if_available() } else { Device::Cpu }),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let index = index.ok_or_else(|| ModelError::input(format!("device `{name}`: use auto, cpu, cuda or cuda:N")))?;
    load_cuda().map_err(|why| ModelError::input(format!("device `{name}`: {why}; use auto or cpu")))?;
    let usable = tch::Cuda::device_count();
    if (index as i64) < usable {
        Ok(Device::Cuda(index))
    } else {
        Err(ModelError::input(format!("device `{name}`: {usable} GPU(s) are usable; use another number, auto or cpu")))
    }
}

/// Bytes that can still be allocated on `device`; none where the system does not say.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(_) => gpu_memory(device).map(|m| m.free),
        _ => {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
            let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
            // A container may have less than its host.
            let limit = number("/sys/fs/cgroup/memory.max");
            let rest = limit.zip(number("/sys/fs/cgroup/memory.current")).map(|(max, used)| max.saturating_sub(used));
            Some((kib * 1024).min(rest.unwrap_or(u64::MAX)))
        }
    }
}

/// Memory of a GPU in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// What can still be allocated, by any process.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Memory of the GPU of the calling thread's context, which libtorch has made; none on a CPU, or where the driver does not say.
#[allow(unsafe_code)]
pub fn gpu_memory(device: Device) -> Option<GpuMemory> {
    if !device.is_cuda() {
        return None;
    }
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: the driver library is loaded already; the symbol has this signature since CUDA 3.2, writes two numbers and keeps
    // no pointer.
    let status = unsafe {
        let library = Library::open(Some(DRIVER), RTLD_NOW).ok()?;
        let call = library.get::<MemGetInfo>(b"cuMemGetInfo_v2").ok()?;
        call(&mut free, &mut total)
    };
    (status == 0).then_some(GpuMemory { free: free as u64, total: total as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        assert!(device("gpu").unwrap_err().to_string().contains("auto, cpu, cuda or cuda:N"));
        let there = std::fs::exists("/dev/nvidia0").unwrap_or(false);
        assert_eq!(device("auto").unwrap() != Device::Cpu, there);
        assert!(device("cuda:99").unwrap_err().to_string().contains("cuda:99"));
    }

    #[test]
    fn memory_is_known_here() {
        let free = free_memory(Device::Cpu).unwrap();
        assert!(free > 1 << 20, "{free}");
        assert_eq!(gpu_memory(Device::Cpu), None);
    }
}
