//! Tests of the whole crate through its public interface.

mod faults;
mod local;
mod world;
