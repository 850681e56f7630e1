//! Advantages, losses and their gradients against independent computations in Python: `golden.py` implements the formulas in
//! PyTorch with autograd in f64, `trl_losses.py` calls TRL's loss. `UNVEIL_SEED` selects other shapes and values.

mod advantages;
mod batch;
mod harness;
mod losses;
mod micro_batches;
mod trl;

/// Reruns the tests with the instruction sets of other machines, which round differently.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[]);
}
