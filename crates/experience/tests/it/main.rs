//! Tests of the state machine through its public interface, in one binary.

mod batches;
mod fixtures;
mod leases;
mod properties;
mod quarantine;
mod set_aside;
mod simulation;
