//! Advantages, losses and their gradients against independent computations in Python: `golden.py` restates the formulas in
//! PyTorch with autograd in f64, `trl_losses.py` calls TRL's own loss. `UNVEIL_SEED` makes other shapes and numbers.

mod advantages;
mod batch;
mod harness;
mod losses;
mod micro;
mod trl;

/// Other rounding than this machine's own.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[]);
}
