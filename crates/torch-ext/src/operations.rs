//! Counts of the operations that a piece of work dispatches, for tests that bound them: launches, copies and waits for the device.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};

use crate::Result;
use crate::library::{NativeLibrary, check_call, function_table, native_library};

type Visit = unsafe extern "C" fn(*mut c_void, *const c_char, i64);

// cpp/operations.cc
function_table! {
    "operations", library();
    begin: unsafe extern "C" fn(*mut c_char, usize) -> c_int = b"unveil_operations_begin",
    end: unsafe extern "C" fn(Visit, *mut c_void, *mut c_char, usize) -> c_int = b"unveil_operations_end",
}

/// cpp/operations.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("operations", "LIBTORCH was not set (make setup sets it)")
}

/// Numbers of operations by name (`aten::mm`); an operation that calls others counts beside them.
pub type OperationCounts = BTreeMap<String, u64>;

/// Runs `work` and counts the operations that it dispatches on the calling thread, those of backward passes on the CPU included. Reads of
/// a number from a tensor count as `aten::_local_scalar_dense`.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if this thread counts already, and
/// [`ExtError::Unavailable`](crate::ExtError::Unavailable) if the library cannot be loaded.
pub fn count_operations<T>(work: impl FnOnce() -> T) -> Result<(T, OperationCounts)> {
    let f = functions()?;
    // SAFETY: the function keeps no pointer.
    check_call("count operations", |m, n| unsafe { (f.begin)(m, n) })?;
    let output = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let mut counts = OperationCounts::new();
    // SAFETY: `visit` is called during this call only, with the map as its context.
    check_call("count operations", |m, n| unsafe { (f.end)(visit, (&raw mut counts).cast(), m, n) })?;
    match output {
        Ok(output) => Ok((output, counts)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Adds one operation to the map behind `counts`.
///
/// # Safety
/// `counts` points to an [`OperationCounts`] that no one else uses, and `name` to a text that ends with a zero.
unsafe extern "C" fn visit(counts: *mut c_void, name: *const c_char, times: i64) {
    // SAFETY: by the caller.
    let (counts, name) = unsafe { (&mut *counts.cast::<OperationCounts>(), CStr::from_ptr(name)) };
    counts.insert(name.to_string_lossy().into_owned(), u64::try_from(times).unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn operations_of_both_passes_are_counted() {
        let w = Tensor::ones([3, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        let (value, counts) = count_operations(|| {
            let loss = x.mm(&w).sum(Kind::Float);
            loss.backward();
            loss.double_value(&[])
        })
        .unwrap();
        assert_eq!(value, 18.0);
        assert_eq!((counts["aten::mm"], counts["aten::_local_scalar_dense"]), (2, 1), "{counts:?}");
        // Counting has ended.
        let (_, counts) = count_operations(|| ()).unwrap();
        assert!(counts.is_empty());
    }

    #[test]
    fn nested_counts_are_refused_and_panics_end_a_count() {
        let (inner, _) = count_operations(|| count_operations(|| ()).unwrap_err().to_string()).unwrap();
        assert!(inner.contains("counted already"), "{inner}");
        assert!(std::panic::catch_unwind(|| count_operations(|| panic!("stop"))).is_err());
        count_operations(|| ()).unwrap();
    }
}
