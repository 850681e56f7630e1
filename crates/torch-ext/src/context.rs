//! Switches of libtorch as a whole.

use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

use crate::library::{Part, checked};
use crate::{ExtError, Result};

/// cpp/context.cc; libtorch is there, since tch links it.
fn part() -> Result<&'static Part, String> {
    static LOADED: OnceLock<Result<Part, String>> = OnceLock::new();
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_context.so"));
    let missing = "LIBTORCH was not set (make setup sets it)";
    LOADED.get_or_init(|| Part::load("unveil_context", bytes, missing)).as_ref().map_err(Clone::clone)
}

/// Has libtorch use only algorithms that give the same results again (`torch.use_deterministic_algorithms`), in the whole process. An
/// operation that has none fails then.
///
/// # Errors
/// The part cannot be used.
#[allow(unsafe_code)]
pub fn set_deterministic(on: bool) -> Result<()> {
    type Switch = unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int;
    // SAFETY: the type is that of cpp/context.cc.
    let switch = part().and_then(|p| unsafe { p.get::<Switch>(b"unveil_context_deterministic") });
    let switch = switch.map_err(|reason| ExtError::Unavailable { part: "context", reason })?;
    // SAFETY: the function keeps no pointer.
    checked("deterministic algorithms", |m, n| unsafe { switch(c_int::from(on), m, n) })
}

/// Whether operations of the calling thread record gradients: [`Tensor::requires_grad`] says what a tensor needs, not whether
/// anything is recorded. True where the part cannot be used.
///
/// [`Tensor::requires_grad`]: tch::Tensor::requires_grad
#[allow(unsafe_code)]
pub fn grad_enabled() -> bool {
    type Ask = unsafe extern "C" fn() -> c_int;
    static ASK: OnceLock<Option<Ask>> = OnceLock::new();
    // SAFETY: the type is that of cpp/context.cc.
    let ask = ASK.get_or_init(|| part().and_then(|p| unsafe { p.get::<Ask>(b"unveil_context_grad") }).ok());
    // SAFETY: the function only reads a flag of this thread.
    ask.is_none_or(|ask| unsafe { ask() } != 0)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn the_gradient_mode_is_the_calling_threads() {
        assert!(grad_enabled());
        let guard = tch::no_grad_guard();
        assert!(!grad_enabled());
        std::thread::scope(|s| assert!(s.spawn(grad_enabled).join().unwrap(), "another thread has its own"));
        tch::with_grad(|| assert!(grad_enabled()));
        drop(guard);
        assert!(grad_enabled());
    }

    /// `put_` has no deterministic algorithm.
    #[test]
    fn operations_that_differ_from_time_to_time_are_refused() {
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
