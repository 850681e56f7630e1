//! Integration tests of the model families. Expected values come from transformers and peft (`tests/golden.py`, `tests/lora.py`).

mod common;
mod directories;
mod golden;
mod groups;
mod lora;

/// The tests that compare floating-point numbers, with each instruction set of libtorch. Bit-equality within one need not hold in
/// another.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[
        "groups::packed_equals_separate",
        "groups::decoding_equals_packed",
        "groups::refilled_caches_continue",
        "groups::gradients_reach_all_parameters_within_the_mask",
        "groups::mismatched_counts_are_refused",
        "groups::segments_equal_one_graph",
        "lora::equals_peft_in_both_directions",
        "lora::recomputed_gradients_are_equal",
    ]);
}
