//! Process-wide and per-thread switches of libtorch.

use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

use crate::library::{NativeLibrary, check_call, native_library};
use crate::{ExtError, Result};

/// cpp/context.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("context", "LIBTORCH was not set (make setup sets it)")
}

/// Restricts libtorch to deterministic algorithms in the whole process (`torch.use_deterministic_algorithms`), or lifts the
/// restriction. While it holds, an operation without a deterministic algorithm fails.
///
/// # Errors
/// Returns [`ExtError::Unavailable`] if the library cannot be loaded.
pub fn set_deterministic(on: bool) -> Result<()> {
    switch("deterministic algorithms", b"unveil_context_deterministic", on)
}

/// Allows or forbids TF32 in matrix products of fp32 operands on GPUs, in the whole process.
///
/// # Errors
/// Returns [`ExtError::Unavailable`] if the library cannot be loaded.
pub fn allow_tf32(on: bool) -> Result<()> {
    switch("TF32", b"unveil_context_tf32", on)
}

/// Turns a switch of cpp/context.cc on or off; `symbol` must be one of its switches.
fn switch(what: &'static str, symbol: &[u8], on: bool) -> Result<()> {
    type Switch = unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int;
    // SAFETY: the type is that of the switches in cpp/context.cc.
    let switch = library().and_then(|l| unsafe { l.get::<Switch>(symbol) });
    let switch = switch.map_err(|reason| ExtError::Unavailable { library: "context", reason })?;
    // SAFETY: the function keeps no pointer.
    check_call(what, |m, n| unsafe { switch(c_int::from(on), m, n) })
}

/// Returns whether operations of the calling thread record gradients ([`Tensor::requires_grad`] only says whether a tensor needs
/// them). True if the library cannot be loaded.
///
/// [`Tensor::requires_grad`]: tch::Tensor::requires_grad
pub fn grad_enabled() -> bool {
    type Query = unsafe extern "C" fn() -> c_int;
    static QUERY: OnceLock<Option<Query>> = OnceLock::new();
    // SAFETY: the type is that of cpp/context.cc.
    let query = QUERY.get_or_init(|| library().and_then(|l| unsafe { l.get::<Query>(b"unveil_context_grad") }).ok());
    // SAFETY: the function only reads a flag of this thread.
    query.is_none_or(|query| unsafe { query() } != 0)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn gradient_mode_is_per_thread() {
        assert!(grad_enabled());
        let guard = tch::no_grad_guard();
        assert!(!grad_enabled());
        std::thread::scope(|s| assert!(s.spawn(grad_enabled).join().unwrap(), "other threads are unaffected"));
        tch::with_grad(|| assert!(grad_enabled()));
        drop(guard);
        assert!(grad_enabled());
    }

    /// `put_` has no deterministic algorithm.
    #[test]
    fn nondeterministic_operations_are_refused() {
        let put = || {
            let mut t = Tensor::zeros([4], (Kind::Float, Device::Cpu));
            t.f_put_(&Tensor::from_slice(&[1i64, 1]), &Tensor::from_slice(&[1.0f32, 2.0]), false).map(drop)
        };
        put().unwrap();
        set_deterministic(true).unwrap();
        let refused = put().unwrap_err().to_string();
        set_deterministic(false).unwrap();
        assert!(refused.contains("deterministic"), "{refused}");
    }
}
