//! The CUDA part and libtorch's own CUDA half: found and loaded at run time, once.

use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::ExtError;
use crate::library::Part;

/// The driver's own library: without it there is no GPU to use, and the large CUDA half is left alone.
const DRIVER: &str = "libcuda.so.1";
const TORCH_CUDA: &str = "libtorch_cuda.so";

/// Loads libtorch's CUDA half for the rest of the process; call it before libtorch is first asked about CUDA.
///
/// # Errors
/// A text that says what cannot be loaded: the machine has no driver, or libtorch no CUDA half.
pub fn load_cuda() -> Result<(), String> {
    open(DRIVER).map_err(|_| format!("no NVIDIA driver here ({DRIVER} cannot be loaded)"))?;
    load_torch()
}

pub(crate) fn load_torch() -> Result<(), String> {
    open(TORCH_CUDA).map_err(|e| format!("libtorch's CUDA half cannot be loaded: {e}"))
}

/// Its symbols and static registrations become visible to libtorch.
#[allow(unsafe_code)]
fn open(name: &str) -> Result<(), libloading::Error> {
    // SAFETY: both libraries are meant to be loaded at any time, and stay loaded: the handle is never closed.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

/// cpp/cuda.cc; [`load_cuda`] must have been called.
pub(crate) fn part() -> Result<&'static Part, String> {
    static LOADED: OnceLock<Result<Part, String>> = OnceLock::new();
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_cuda.so"));
    let load =
        || Part::load("unveil_cuda", bytes, "CUDA's headers were not beside libtorch (make setup installs them)");
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

pub(crate) fn unavailable(reason: &str) -> ExtError {
    ExtError::Unavailable { part: "CUDA", reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cuda_half_is_found_at_run_time() {
        // libtorch looks for its CUDA half once, at the first question: it must be loaded before that.
        load_torch().unwrap();
        assert!(tch::utils::has_cudart());
    }

    #[test]
    fn a_machine_without_a_driver_says_so() {
        let there = std::fs::exists("/dev/nvidia0").unwrap_or(false);
        assert_eq!(load_cuda().err().map(|e| e.contains(DRIVER)), (!there).then_some(true));
    }
}
