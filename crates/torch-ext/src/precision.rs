//! Matrix products whose operands are narrower than their results, with gradients in full precision. libtorch has no such product on the
//! CPU and no derivative of it on GPUs, and its engine rounds the gradient of a bf16 weight to bf16.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;

use crate::Result;
use crate::library::{NativeLibrary, check_call, function_table, native_library};

// cpp/precision.cc
function_table! {
    "precision", library();
    linear: unsafe extern "C" fn(
        *const c_void, *const *const c_void, *const *const c_void, i64, *const c_void, *const c_void, c_int, *mut *mut c_void,
        *mut c_char, usize,
    ) -> c_int = b"unveil_mixed_linear",
    round: unsafe extern "C" fn(*const c_void, *mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_round_through",
    wide_gradient: unsafe extern "C" fn(*const c_void, *mut c_char, usize) -> c_int = b"unveil_wide_gradient",
}

/// cpp/precision.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("precision", "LIBTORCH was not set (make setup sets it)")
}

/// Operands of a matrix product with fp32 sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operands {
    /// Both operands are rounded to bf16. Needs an fp32 input.
    Bf16,
    /// The weights are converted to the dtype of the input.
    Input,
}

/// Matrices `[N_i, K]` that are multiplied with the same input, and their biases `[N_i]`: one for each matrix, or none.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSet<'a> {
    /// The matrices, which may be trained.
    pub weights: &'a [&'a Tensor],
    /// Their biases.
    pub biases: &'a [&'a Tensor],
    /// The matrices in one tensor, and the biases in another, if their memory is arranged so: saves a concatenation.
    pub whole: Option<(&'a Tensor, Option<&'a Tensor>)>,
}

/// Computes `x W^T + b` for `x [.., K]` and all matrices of a set: `[.., sum N_i]` in the dtype of `x`. The gradients of weights and
/// biases are computed in that dtype, whatever theirs is (see [`keep_wide_gradient`]), and the graph holds no converted copy of a weight.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if shapes or dtypes do not match, and
/// [`ExtError::Unavailable`](crate::ExtError::Unavailable) if the library cannot be loaded.
pub fn mixed_linear(x: &Tensor, set: &MatrixSet<'_>, operands: Operands) -> Result<Tensor> {
    const WHAT: &str = "matrix product";
    if !set.biases.is_empty() && set.biases.len() != set.weights.len() {
        let message = format!("{} biases for {} matrices", set.biases.len(), set.weights.len());
        return Err(crate::ExtError::Refused { what: WHAT, message });
    }
    let f = functions()?;
    let handle = |t: &Tensor| t.as_ptr().cast::<c_void>();
    let weights: Vec<*const c_void> = set.weights.iter().map(|t| handle(t)).collect();
    let biases: Vec<*const c_void> = set.biases.iter().map(|t| handle(t)).collect();
    let none = std::ptr::null();
    let whole = set.whole.map_or(none, |(weight, _)| handle(weight));
    let whole_bias = set.whole.and_then(|(_, bias)| bias).filter(|_| !biases.is_empty()).map_or(none, handle);
    let biases = if biases.is_empty() { std::ptr::null() } else { biases.as_ptr() };
    let rounded = c_int::from(operands == Operands::Bf16);
    let count = weights.len() as i64;
    let mut out = std::ptr::null_mut();
    // SAFETY: the handles are those of live tensors; `weights` has `count` of them, and so has `biases` unless it is null.
    check_call(WHAT, |m, n| unsafe {
        (f.linear)(handle(x), weights.as_ptr(), biases, count, whole, whole_bias, rounded, &raw mut out, m, n)
    })?;
    // SAFETY: the call has succeeded and returned a new tensor, which belongs to the caller.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Rounds values to bf16 and returns them in their dtype. The gradient passes as if nothing were rounded.
///
/// # Errors
/// Returns [`ExtError::Unavailable`](crate::ExtError::Unavailable) if the library cannot be loaded.
pub fn round_through(t: &Tensor) -> Result<Tensor> {
    let f = functions()?;
    let mut out = std::ptr::null_mut();
    // SAFETY: the handle is that of a live tensor.
    check_call("rounding to bf16", |m, n| unsafe { (f.round)(t.as_ptr().cast(), &raw mut out, m, n) })?;
    // SAFETY: the call has succeeded and returned a new tensor, which belongs to the caller.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Makes the gradients of a leaf fp32, whatever its dtype. By default each gradient is rounded to the dtype of its leaf.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the tensor is not a leaf, and
/// [`ExtError::Unavailable`](crate::ExtError::Unavailable) if the library cannot be loaded.
pub fn keep_wide_gradient(leaf: &Tensor) -> Result<()> {
    let f = functions()?;
    // SAFETY: the handle is that of a live tensor.
    check_call("dtype of a gradient", |m, n| unsafe { (f.wide_gradient)(leaf.as_ptr().cast(), m, n) })
}
