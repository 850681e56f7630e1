//! Integration tests of checkpoints, through the public interface.

mod common;
mod faults;
mod killed;
mod local;
mod uploads;
