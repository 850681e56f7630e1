//! Integration tests of the C++ shim: CPU kernels and Gloo.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

mod cpu_kernels;
mod gloo;
