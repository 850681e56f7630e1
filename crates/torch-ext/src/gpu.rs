//! Whole-GPU operations: the current GPU of a thread, the state of libtorch's allocator, and page-locked host memory.

use std::ffi::{c_char, c_int, c_void};

use crate::library::{check_call, function_table};
use crate::{Result, cuda};

// cpp/cuda.cc
function_table! {
    "CUDA", cuda::library();
    select: unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int = b"unveil_gpu_select",
    allocator_memory: unsafe extern "C" fn(c_int, *mut i64, *mut i64, *mut c_char, usize) -> c_int = b"unveil_gpu_allocator_memory",
    pin: unsafe extern "C" fn(*mut c_void, usize, *mut c_char, usize) -> c_int = b"unveil_host_pin",
    unpin: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int = b"unveil_host_unpin",
}

/// Makes GPU `device` the calling thread's current GPU.
///
/// # Errors
/// Returns [`ExtError::Unavailable`] if the CUDA library cannot be loaded, and [`ExtError::Refused`] if there is no such GPU.
///
/// [`ExtError::Unavailable`]: crate::ExtError::Unavailable
/// [`ExtError::Refused`]: crate::ExtError::Refused
pub fn select_gpu(device: usize) -> Result<()> {
    let f = functions()?;
    // SAFETY: the function keeps no pointer.
    check_call("select a GPU", |m, n| unsafe { (f.select)(c_int::try_from(device).unwrap_or(-1), m, n) })
}

/// Memory of one GPU as libtorch's caching allocator counts it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AllocatorMemory {
    /// Memory that the allocator has obtained from the driver.
    pub reserved: u64,
    /// The part of it that tensors use; the rest is available to new tensors.
    pub allocated: u64,
}

/// Returns what libtorch's allocator holds of the memory of GPU `device`.
///
/// # Errors
/// Returns [`ExtError::Unavailable`] if the CUDA library cannot be loaded, and [`ExtError::Refused`] if there is no such GPU.
///
/// [`ExtError::Unavailable`]: crate::ExtError::Unavailable
/// [`ExtError::Refused`]: crate::ExtError::Refused
pub fn allocator_memory(device: usize) -> Result<AllocatorMemory> {
    let f = functions()?;
    let mut reserved = 0;
    let mut allocated = 0;
    // SAFETY: both numbers are written during the call only.
    check_call("read the allocator statistics of a GPU", |m, n| unsafe {
        (f.allocator_memory)(c_int::try_from(device).unwrap_or(-1), &raw mut reserved, &raw mut allocated, m, n)
    })?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(AllocatorMemory { reserved: bytes(reserved), allocated: bytes(allocated) })
}

/// Page-locks host memory in place, so that a GPU copies to and from it at the full rate of the bus.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the driver refuses.
pub(crate) fn pin(memory: &mut [u8]) -> Result<()> {
    let f = functions()?;
    // SAFETY: the memory outlives the call; its owner unpins it before freeing it.
    check_call("page-lock host memory", |m, n| unsafe { (f.pin)(memory.as_mut_ptr().cast(), memory.len(), m, n) })
}

/// Undoes [`pin`] for memory with this start address.
pub(crate) fn unpin(memory: &mut [u8]) -> Result<()> {
    let f = functions()?;
    // SAFETY: the memory outlives the call.
    check_call("unlock host memory", |m, n| unsafe { (f.unpin)(memory.as_mut_ptr().cast(), m, n) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All functions are in the library. Without a GPU each is refused, and the process survives.
    #[test]
    fn calls_work_or_are_refused() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        let mut memory = vec![0u8; 1 << 16];
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            select_gpu(0).unwrap();
            let held = allocator_memory(0).unwrap();
            assert!(held.reserved >= held.allocated);
            pin(&mut memory).unwrap();
            unpin(&mut memory).unwrap();
            return;
        }
        assert!(select_gpu(0).unwrap_err().to_string().contains("select a GPU"));
        assert!(pin(&mut memory).unwrap_err().to_string().contains("page-lock host memory"));
        // Nothing was ever allocated there.
        assert_eq!(allocator_memory(0).unwrap(), AllocatorMemory::default());
    }
}
