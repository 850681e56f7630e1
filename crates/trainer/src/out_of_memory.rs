//! Lack of memory during an update, as an error in place of libtorch's panic.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use crate::error::Result;

/// Returns whether a message of libtorch reports a lack of memory.
fn is_out_of_memory(message: &str) -> bool {
    ["out of memory", "can't allocate memory", "not enough memory", "bad allocation"]
        .iter()
        .any(|w| message.contains(w))
}

/// Runs `work` and returns its result.
///
/// # Errors
/// Returns libtorch's message if there was not enough memory.
pub(crate) fn catch_out_of_memory<T>(work: impl FnOnce() -> Result<T>) -> Result<Result<T>, String> {
    silence_out_of_memory_panics();
    // The operators of tch panic on errors. The learner ends after this one, so no broken state is used.
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let message = match outcome {
        Ok(Ok(value)) => return Ok(Ok(value)),
        Ok(Err(e)) => match e.to_string() {
            m if is_out_of_memory(&m) => m,
            _ => return Ok(Err(e)),
        },
        Err(panic) => match panic_message(panic.as_ref()) {
            Some(m) if is_out_of_memory(m) => m.to_owned(),
            _ => resume_unwind(panic),
        },
    };
    Err(message.lines().find(|l| is_out_of_memory(l)).unwrap_or_default().trim().to_owned())
}

/// Returns the message of a panic, if it has one.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
}

/// Keeps panics for lack of memory off the terminal; they become errors, which say more.
fn silence_out_of_memory_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload_as_str().is_some_and(is_out_of_memory) {
                previous(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::TrainerError;

    #[test]
    fn out_of_memory_is_distinguished_from_other_errors() {
        let out_of_memory = || -> Result<()> {
            panic!("Torch(\"[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\")")
        };
        assert!(catch_out_of_memory(out_of_memory).unwrap_err().contains("can't allocate memory"));
        let other = || -> Result<()> { Err(TrainerError::Setting("another error".into())) };
        assert_eq!(catch_out_of_memory(other).unwrap().unwrap_err().to_string(), "another error");
        assert!(catch_unwind(|| catch_out_of_memory(|| -> Result<()> { panic!("a bug") })).is_err());
        assert_eq!(catch_out_of_memory(|| Ok(3)).unwrap().unwrap(), 3);
    }
}
