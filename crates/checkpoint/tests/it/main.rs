//! Integration tests of checkpoints, through the public interface.

mod common;
mod examples;
mod faults;
mod killed;
mod local;
mod uploads;
