//! Integration tests of the C++ shim: CPU kernels, attention of packed sequences, products of bf16 operands, and Gloo.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "tests read their seed from the environment")]

mod cpu_kernels;
mod gloo;
mod packed_attention;
mod precision;

/// Returns the seed of random shapes and values, which `UNVEIL_SEED` selects.
fn seed() -> i64 {
    std::env::var("UNVEIL_SEED").map_or(0, |s| s.parse().expect("UNVEIL_SEED is a number"))
}
