//! Backward passes that start from given gradients. tch starts them from a scalar only, which a vector-Jacobian product would have to be
//! computed for.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;

use crate::Result;
use crate::library::{NativeLibrary, check_call, function_table, native_library};

// cpp/autograd.cc
function_table! {
    "autograd", library();
    backward: unsafe extern "C" fn(*const *const c_void, *const *const c_void, i64, *mut c_char, usize) -> c_int
        = b"unveil_backward",
}

/// cpp/autograd.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("autograd", "LIBTORCH was not set (make setup sets it)")
}

/// Computes the vector-Jacobian product of several outputs, each given with its gradient. The products accumulate in the gradients of the
/// leaves, and the graph is freed.
///
/// # Errors
/// Returns [`ExtError::Refused`](crate::ExtError::Refused) if an output has no graph, a gradient does not have the shape of its output, or
/// an operation fails, and [`ExtError::Unavailable`](crate::ExtError::Unavailable) if the library cannot be loaded.
pub fn backward(outputs: &[(&Tensor, &Tensor)]) -> Result<()> {
    if outputs.is_empty() {
        return Ok(());
    }
    let f = functions()?;
    let roots: Vec<*const c_void> = outputs.iter().map(|(t, _)| t.as_ptr().cast()).collect();
    let gradients: Vec<*const c_void> = outputs.iter().map(|(_, g)| g.as_ptr().cast()).collect();
    // SAFETY: the handles are those of live tensors, and both lists have the given length.
    check_call("backward pass", |m, n| unsafe {
        (f.backward)(roots.as_ptr(), gradients.as_ptr(), roots.len() as i64, m, n)
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Double, Device::Cpu))
    }

    #[test]
    fn products_equal_those_of_a_scalar() {
        tch::manual_seed(3);
        let weights = random(&[4, 3]);
        let x = random(&[5, 4]);
        let seeds = [random(&[5, 3]), random(&[5, 3])];
        let run = |product: &dyn Fn(&[Tensor; 2])| {
            let w = weights.detach().set_requires_grad(true);
            let y = x.matmul(&w);
            let z = y.sin();
            product(&[y, z]);
            w.grad()
        };
        let ours = run(&|[y, z]| backward(&[(y, &seeds[0]), (z, &seeds[1])]).unwrap());
        let scalar = run(&|[y, z]| (y * &seeds[0] + z * &seeds[1]).sum(Kind::Double).backward());
        assert_eq!(ours, scalar);
    }

    #[test]
    fn outputs_without_graph_and_foreign_shapes_are_refused() {
        let t = random(&[3]);
        assert!(backward(&[(&t, &t)]).unwrap_err().to_string().contains("does not require grad"));
        let leaf = random(&[3]).set_requires_grad(true);
        assert!(backward(&[(&(&leaf * 2.0), &random(&[4]))]).unwrap_err().to_string().contains("shape"));
        assert!(!leaf.grad().defined());
        backward(&[]).unwrap();
    }
}
