//! Integration tests of the NCCL bindings, with the real library and with a stand-in for it.

#![expect(unsafe_code, reason = "tests pass raw buffers and read the stand-in's variables")]

mod library;
mod states;
