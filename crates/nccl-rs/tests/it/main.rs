//! Integration tests of the NCCL bindings, with the real library and with a stand-in for it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]
#![expect(unsafe_code, reason = "tests pass raw buffers and read the stand-in's variables")]

mod library;
mod states;
