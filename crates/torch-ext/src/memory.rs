//! Freeing and reallocating the memory behind tensors while the tensors themselves stay, for sharded parameters.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;

use crate::Result;
use crate::library::{NativeLibrary, check_call, function_table, native_library};

// cpp/memory.cc
function_table! {
    "memory", library();
    size: unsafe extern "C" fn(*mut c_void, *mut i64, *mut c_char, usize) -> c_int = b"unveil_memory_size",
    resize: unsafe extern "C" fn(*mut c_void, i64, *mut c_char, usize) -> c_int = b"unveil_memory_resize",
    drop_grad: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int = b"unveil_memory_drop_grad",
}

/// cpp/memory.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("memory", "LIBTORCH was not set (make setup sets it)")
}

/// Returns the size in bytes of the memory behind `tensor`, which it may share with others; `None` if [`resize_memory`] would refuse.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the tensor has no memory.
pub fn memory_size(tensor: &Tensor) -> Result<Option<usize>> {
    let f = functions()?;
    let mut bytes = 0;
    // SAFETY: the handle is that of a live tensor.
    check_call("size of memory", |m, n| unsafe { (f.size)(tensor.as_ptr().cast_mut().cast(), &raw mut bytes, m, n) })?;
    Ok(usize::try_from(bytes).ok())
}

/// Frees the memory behind `tensor` (0 bytes), or allocates new memory with undefined contents. All tensors that share it keep their
/// shapes and see the new memory; none of them may be read or written while it is smaller than they need.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the memory does not belong to libtorch (a mapped file), or if there is
/// not enough.
pub fn resize_memory(tensor: &Tensor, bytes: usize) -> Result<()> {
    let f = functions()?;
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    // SAFETY: the handle is that of a live tensor.
    check_call("resize memory", |m, n| unsafe { (f.resize)(tensor.as_ptr().cast_mut().cast(), bytes, m, n) })
}

/// Drops the gradient of a leaf and frees its memory, which [`Tensor::zero_grad`] would keep.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if libtorch refuses.
pub fn drop_grad(tensor: &Tensor) -> Result<()> {
    let f = functions()?;
    // SAFETY: the handle is that of a live tensor.
    check_call("drop a gradient", |m, n| unsafe { (f.drop_grad)(tensor.as_ptr().cast_mut().cast(), m, n) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn views_survive_freed_and_reallocated_memory() {
        let whole = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let row = whole.narrow(0, 1, 1).detach().set_requires_grad(true);
        assert_eq!(memory_size(&row).unwrap(), Some(24));
        // What autograd saved of the row sees the new memory too.
        let loss = (row.square() * 2.0).sum(Kind::Float);
        resize_memory(&row, 0).unwrap();
        assert_eq!((memory_size(&whole).unwrap(), whole.size()), (Some(0), vec![2, 3]));
        resize_memory(&row, 24).unwrap();
        let values = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3]);
        tch::no_grad(|| whole.data().copy_(&values));
        assert_eq!(Vec::<f32>::try_from(row.detach().view([-1])).unwrap(), [4.0, 5.0, 6.0]);
        loss.backward();
        assert_eq!(Vec::<f32>::try_from(row.grad().view([-1])).unwrap(), [16.0, 20.0, 24.0]);
        drop_grad(&row).unwrap();
        assert!(!row.grad().defined());
        drop_grad(&row).unwrap();
    }

    #[test]
    fn foreign_memory_is_refused() {
        let numbers = [1.0f32; 4];
        // SAFETY: the numbers outlive the tensor.
        let foreign = unsafe { Tensor::from_blob(numbers.as_ptr().cast(), &[4], &[1], Kind::Float, Device::Cpu) };
        assert_eq!(memory_size(&foreign).unwrap(), None);
        let e = resize_memory(&foreign, 0).unwrap_err().to_string();
        assert!(e.contains("another library"), "{e}");
    }
}
