//! The memory behind tensors: given back and taken anew while the tensors themselves stay, as sharded parameters need it.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use tch::Tensor;

use crate::library::{Part, checked};
use crate::{ExtError, Result};

/// The functions of cpp/memory.cc.
struct Functions {
    size: unsafe extern "C" fn(*mut c_void, *mut i64, *mut c_char, usize) -> c_int,
    resize: unsafe extern "C" fn(*mut c_void, i64, *mut c_char, usize) -> c_int,
    drop_grad: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int,
}

/// cpp/memory.cc; libtorch is there, since tch links it.
fn part() -> Result<&'static Part, String> {
    static LOADED: OnceLock<Result<Part, String>> = OnceLock::new();
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_memory.so"));
    let missing = "LIBTORCH was not set (make setup sets it)";
    LOADED.get_or_init(|| Part::load("unveil_memory", bytes, missing)).as_ref().map_err(Clone::clone)
}

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(load).as_ref();
    loaded.map_err(|e| ExtError::Unavailable { part: "memory", reason: e.clone() })
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    let part = part()?;
    // SAFETY: the types are those of cpp/memory.cc.
    unsafe {
        Ok(Functions {
            size: part.get(b"unveil_memory_size")?,
            resize: part.get(b"unveil_memory_resize")?,
            drop_grad: part.get(b"unveil_memory_drop_grad")?,
        })
    }
}

/// Bytes of the memory behind `tensor`, which it may share with others; none where [`resize_memory`] would refuse.
///
/// # Errors
/// The tensor has none.
#[allow(unsafe_code)]
pub fn memory_size(tensor: &Tensor) -> Result<Option<usize>> {
    let (f, mut bytes) = (functions()?, 0);
    // SAFETY: the handle is that of a living tensor.
    checked("size of memory", |m, n| unsafe { (f.size)(tensor.as_ptr().cast_mut().cast(), &raw mut bytes, m, n) })?;
    Ok(usize::try_from(bytes).ok())
}

/// Gives the memory behind `tensor` back (0 bytes), or takes new memory, whose contents are undefined. All tensors that share it
/// keep their shapes and see the new memory; none of them may be read or written while it is smaller than they need.
///
/// # Errors
/// The memory is not libtorch's own (a file's map), or there is not enough.
#[allow(unsafe_code)]
pub fn resize_memory(tensor: &Tensor, bytes: usize) -> Result<()> {
    let f = functions()?;
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    // SAFETY: the handle is that of a living tensor.
    checked("resize memory", |m, n| unsafe { (f.resize)(tensor.as_ptr().cast_mut().cast(), bytes, m, n) })
}

/// Forgets the gradient of a leaf; [`Tensor::zero_grad`] would keep its memory.
///
/// # Errors
/// libtorch refuses.
#[allow(unsafe_code)]
pub fn drop_grad(tensor: &Tensor) -> Result<()> {
    let f = functions()?;
    // SAFETY: the handle is that of a living tensor.
    checked("drop a gradient", |m, n| unsafe { (f.drop_grad)(tensor.as_ptr().cast_mut().cast(), m, n) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn memory_goes_and_comes_while_views_stay() {
        let whole = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let row = whole.narrow(0, 1, 1).detach().set_requires_grad(true);
        assert_eq!(memory_size(&row).unwrap(), Some(24));
        // What a backward pass kept of the row sees the new memory too.
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
    fn memory_of_others_is_refused() {
        let numbers = [1.0f32; 4];
        #[allow(unsafe_code)]
        // SAFETY: the numbers outlive the tensor.
        let foreign = unsafe { Tensor::from_blob(numbers.as_ptr().cast(), &[4], &[1], Kind::Float, Device::Cpu) };
        assert_eq!(memory_size(&foreign).unwrap(), None);
        let e = resize_memory(&foreign, 0).unwrap_err().to_string();
        assert!(e.contains("another library"), "{e}");
    }
}
