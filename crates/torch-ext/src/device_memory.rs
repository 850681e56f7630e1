//! Memory of devices that is left, as libtorch's allocator, the GPU driver and the system count it.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_NOW};
use procfs::{Current, Meminfo};
use tch::Device;

use crate::gpu::{AllocatorMemory, allocator_memory};

/// The library of the GPU driver.
const DRIVER: &str = "libcuda.so.1";

/// Returns how many bytes can still be allocated on `device`; `None` if the system does not report it. Memory that libtorch's allocator
/// has reserved but that no tensor uses counts as free.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(gpu) => allocatable_memory(gpu, driver_memory, |gpu| allocator_memory(gpu).ok()),
        _ => {
            let host = Meminfo::current().ok().and_then(|memory| memory.mem_available);
            let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
            // A container may have less memory than its host.
            let limit = number("/sys/fs/cgroup/memory.max");
            let container =
                limit.zip(number("/sys/fs/cgroup/memory.current")).map(|(max, used)| max.saturating_sub(used));
            host.into_iter().chain(container).min()
        }
    }
}

/// Returns how much memory new tensors may use on a GPU: free memory of the driver, plus memory that the allocator has reserved but no
/// tensor uses. If that is fragmented, the allocator returns it to the driver before it fails.
fn allocatable_memory(
    gpu: usize,
    driver: impl Fn(usize) -> Option<GpuMemory>,
    allocator: impl Fn(usize) -> Option<AllocatorMemory>,
) -> Option<u64> {
    let held = allocator(gpu).unwrap_or_default();
    Some(driver(gpu)?.free.saturating_add(held.reserved.saturating_sub(held.allocated)))
}

/// Memory of a GPU in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// Memory that no process has allocated; an allocator may hold some that its process does not use.
    pub free: u64,
    /// Total memory.
    pub total: u64,
}

/// Returns the memory of a GPU as its driver counts it; `None` on a CPU, or if the driver does not report it.
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

/// The driver's functions for memory information. They report on the calling thread's current context, so the context of the GPU in
/// question is made current meanwhile.
struct Driver {
    device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    retain: unsafe extern "C" fn(*mut Context, c_int) -> c_int,
    release: unsafe extern "C" fn(c_int) -> c_int,
    push: unsafe extern "C" fn(Context) -> c_int,
    pop: unsafe extern "C" fn(*mut Context) -> c_int,
    memory: unsafe extern "C" fn(*mut usize, *mut usize) -> c_int,
}

impl Driver {
    fn open(library: &Path) -> Option<Self> {
        // SAFETY: the driver's library may be loaded at any time, and stays loaded: the handle is never closed. The symbols have had
        // these signatures since CUDA 7.
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
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        let mut free = 0usize;
        let mut total = 0usize;
        // SAFETY: every variable is written before it is read, and the driver keeps no pointer; what is retained is released, what is
        // pushed is popped. libtorch uses the same primary context and retains it as long as it has anything there.
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
    fn cpu_memory_is_reported() {
        let free = free_memory(Device::Cpu).unwrap();
        assert!(free > 1 << 20, "{free}");
        assert_eq!(gpu_memory(Device::Cpu), None);
    }

    /// A fake driver with three GPUs: each reports its own memory, whatever the thread's current context, and no context is left behind.
    #[test]
    fn gpu_memory_is_that_of_the_given_gpu() {
        let fake = unveil_testkit::FakeDriver::build(&[(10, 100), (20, 200), (30, 300)]);
        let driver = Driver::open(fake.library()).unwrap();
        let memory = [2, 0, 1].map(|gpu| driver.memory(gpu).unwrap());
        assert_eq!(memory.map(|m| (m.free, m.total)), [(30, 300), (10, 100), (20, 200)]);
        assert_eq!(driver.memory(3), None);
        // SAFETY: the function is in the fake driver and has no arguments.
        let held = unsafe {
            let library = Library::open(Some(fake.library()), RTLD_NOW).unwrap();
            library.get::<unsafe extern "C" fn() -> c_int>(b"fake_held").unwrap()()
        };
        assert_eq!(held, 0, "contexts left behind");
        assert!(Driver::open(Path::new("/nowhere/libcuda.so.1")).is_none());
    }

    /// The allocator keeps the memory of a batch that has ended for the next one.
    #[test]
    fn unused_allocator_memory_is_free() {
        let driver = |gpu| (gpu == 2).then_some(GpuMemory { free: 1_000, total: 9_000 });
        let held = |gpu| (gpu == 2).then_some(AllocatorMemory { reserved: 7_500, allocated: 500 });
        assert_eq!(allocatable_memory(2, driver, held), Some(8_000));
        assert_eq!(allocatable_memory(2, driver, |_| None), Some(1_000));
        assert_eq!(allocatable_memory(0, driver, held), None);
    }
}
