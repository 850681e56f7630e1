//! Integration tests of the reward crate.

mod answers;
mod bccd;
mod examples;
mod gaming;
mod golden;
mod grpc;
mod hostile;
mod judge;
mod limits;
mod offline;
mod readiness;
