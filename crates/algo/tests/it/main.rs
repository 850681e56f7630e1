//! Advantages, losses and their gradients against independent computations in Python: `golden.py` implements the formulas in
//! PyTorch with autograd in f64, `trl_losses.py` calls TRL's loss. `UNVEIL_SEED` selects other shapes and values.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod advantages;
mod batch;
mod harness;
mod losses;
mod micro_batches;
mod trl;

/// Reruns tests with the instruction sets of other machines, which round differently. `UNVEIL_DISPATCH=all` reruns all of them, with those
/// against Python.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[
        // Sums of all terms and reductions, forward and backward, within 1e-12.
        "micro_batches::losses_and_gradients_add_up",
        // Clip bounds and zero advantages: comparisons and selections.
        "losses::gradients_of_omitted_terms_are_zero",
    ]);
}
