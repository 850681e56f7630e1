//! The device that a configuration names. Loads libtorch's CUDA half at run time, so that one build serves hosts with and
//! without a GPU.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_NOW};
use tch::Device;
use unveil_torch_ext::{Kept, kept_memory, load_cuda};

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

/// Bytes that can still be allocated on `device`; none where the system does not say. What libtorch's allocator keeps for the next
/// tensors counts as free.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(gpu) => gpu_free(gpu, driver_memory, |gpu| kept_memory(gpu).ok()),
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

/// What a new tensor may take on a GPU: what the driver has, and what the allocator took from it that no tensor uses. Where that lies in
/// pieces, the allocator gives it back before it refuses.
fn gpu_free(
    gpu: usize,
    driver: impl Fn(usize) -> Option<GpuMemory>,
    allocator: impl Fn(usize) -> Option<Kept>,
) -> Option<u64> {
    let kept = allocator(gpu).unwrap_or_default();
    Some(driver(gpu)?.free.saturating_add(kept.reserved.saturating_sub(kept.allocated)))
}

/// Memory of a GPU in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// What no process has taken; a process's allocator may keep some of what it took.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Memory of that GPU as its driver counts it; none on a CPU, or where the driver does not say.
pub fn gpu_memory(device: Device) -> Option<GpuMemory> {
    match device {
        Device::Cuda(gpu) => driver_memory(gpu),
        _ => None,
    }
}

fn driver_memory(gpu: usize) -> Option<GpuMemory> {
    static DRIVERS: OnceLock<Option<Driver>> = OnceLock::new();
    DRIVERS.get_or_init(|| Driver::open(Path::new(DRIVER))).as_ref()?.memory(gpu)
}

type Context = *mut c_void;

/// The calls of the driver that tell of memory. It answers for the calling thread's present context, so that of the GPU in question is
/// made present meanwhile.
struct Driver {
    device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    retain: unsafe extern "C" fn(*mut Context, c_int) -> c_int,
    release: unsafe extern "C" fn(c_int) -> c_int,
    push: unsafe extern "C" fn(Context) -> c_int,
    pop: unsafe extern "C" fn(*mut Context) -> c_int,
    memory: unsafe extern "C" fn(*mut usize, *mut usize) -> c_int,
}

#[allow(unsafe_code)]
impl Driver {
    fn open(library: &Path) -> Option<Self> {
        // SAFETY: the driver's library may be loaded at any time, and stays loaded: the handle is never closed. The symbols have these
        // signatures since CUDA 7.
        unsafe {
            let library = ManuallyDrop::new(Library::open(Some(library), RTLD_NOW).ok()?);
            Some(Self {
                device: *library.get(b"cuDeviceGet").ok()?,
                retain: *library.get(b"cuDevicePrimaryCtxRetain").ok()?,
                release: *library.get(b"cuDevicePrimaryCtxRelease_v2").ok()?,
                push: *library.get(b"cuCtxPushCurrent_v2").ok()?,
                pop: *library.get(b"cuCtxPopCurrent_v2").ok()?,
                memory: *library.get(b"cuMemGetInfo_v2").ok()?,
            })
        }
    }

    fn memory(&self, gpu: usize) -> Option<GpuMemory> {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: every place is written before it is read, and the driver keeps none; what is retained is released, what is pushed is
        // popped. The primary context is the one that libtorch uses, which holds it as long as it has anything there.
        unsafe {
            if (self.device)(&raw mut device, c_int::try_from(gpu).ok()?) != 0
                || (self.retain)(&raw mut context, device) != 0
            {
                return None;
            }
            let mut status = (self.push)(context);
            if status == 0 {
                status = (self.memory)(&raw mut free, &raw mut total);
                (self.pop)(&raw mut context);
            }
            (self.release)(device);
            (status == 0).then_some(GpuMemory { free: free as u64, total: total as u64 })
        }
    }
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
    /// Scripted numbers for three GPUs: each answers for itself, whatever is present on the thread, and nothing stays behind.
    #[test]
    #[allow(unsafe_code)]
    fn memory_is_that_of_the_gpu_in_question() {
        let fake = unveil_testkit::FakeDriver::build(&[(10, 100), (20, 200), (30, 300)]);
        let driver = Driver::open(fake.library()).unwrap();
        let found = [2, 0, 1].map(|gpu| driver.memory(gpu).unwrap());
        assert_eq!(found.map(|m| (m.free, m.total)), [(30, 300), (10, 100), (20, 200)]);
        assert_eq!(driver.memory(3), None);
        // SAFETY: the function is in the stand-in and takes nothing.
        let held = unsafe {
            let library = Library::open(Some(fake.library()), RTLD_NOW).unwrap();
            library.get::<unsafe extern "C" fn() -> c_int>(b"fake_held").unwrap()()
        };
        assert_eq!(held, 0, "contexts that were left");
        assert!(Driver::open(Path::new("/nowhere/libcuda.so.1")).is_none());
    }

    /// A batch has ended: the allocator keeps its memory, and the next batch may have it.
    #[test]
    fn what_the_allocator_keeps_is_free() {
        let driver = |gpu| (gpu == 2).then_some(GpuMemory { free: 1_000, total: 9_000 });
        let kept = |gpu| (gpu == 2).then_some(Kept { reserved: 7_500, allocated: 500 });
        assert_eq!(gpu_free(2, driver, kept), Some(8_000));
        assert_eq!(gpu_free(2, driver, |_| None), Some(1_000));
        assert_eq!(gpu_free(0, driver, kept), None);
    }
}
