//! Tests of the trainer through its public interface, against PyTorch, transformers and itself on one rank.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod algorithms;
mod compute;
mod lora;
mod memory;
mod operations;
mod optim;
mod planned_memory;
mod policy;
mod ranks;
mod replay;
mod sft;
mod sft_ranks;
mod sft_reference;

/// Reruns tests with other instruction sets, which round differently. `UNVEIL_DISPATCH=all` reruns all of them, with those against Python.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[
        // Packed forward and backward in fp32, all advantages and reductions, clipping and AdamW.
        "policy::micro_batches_equal_one_batch",
        // Matrix products in bf16, and rounding of fp32 masters.
        "policy::bf16_weights_are_trained_with_fp32_masters",
        // Captured attention with gradients, entropy, and KL to a reference.
        "policy::attention_entropy_and_kl_enter_the_loss",
        // Several answers in a row, in micro-batches.
        "sft::every_division_equals_one_pass",
    ]);
}
