//! Integration tests of the model families. Expected values come from transformers and peft (`tests/golden.py`, `tests/lora.py`).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod common;
mod config;
mod directories;
mod golden;
mod groups;
mod kernels;
mod logprob;
mod lora;
mod merge;
mod precision;
mod tape;
mod value_head;

/// Reruns tests that compare floating-point numbers with other instruction sets of libtorch. `UNVEIL_DISPATCH=all` reruns all tests, with
/// those against Python. Bit-equality within one set need not hold in another.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[
        // Vision tower, packed pass and prefill, with captured attention, against passes of single responses.
        "groups::packed_equals_separate",
        // Decode steps with this project's kernels, against the packed pass. They choose their instruction set themselves, see `kernels`.
        "groups::decoding_equals_packed",
        "groups::refilled_caches_continue",
        // Matrix products of any number of rows.
        "kernels::logits_are_independent_of_the_number_of_rows",
        // Backward passes, with recomputation and adapters.
        "groups::gradients_reach_all_parameters_within_the_mask",
        "groups::segments_equal_one_graph",
        "lora::recomputed_gradients_are_equal",
        // Low-rank products, added to weights and removed from them.
        "merge::merges_do_not_drift",
        // Products of bf16 operands, and caches of bf16 keys and values.
        "precision::decoding_agrees_with_teacher_forcing_in_every_mode",
        // Log-softmax.
        "logprob::banned_tokens_have_no_probability",
    ]);
}
