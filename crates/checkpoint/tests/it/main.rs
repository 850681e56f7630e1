//! Tests of the whole crate through its public interface.

mod faults;
mod killed;
mod local;
mod uploads;
mod world;
