//! Tests of the learner through its public interface, most of them over real gRPC or with real processes.

mod access;
mod algorithms;
mod asynchrony;
mod broadcast;
mod checkpoint_damage;
mod common;
mod experience_server;
mod leases;
mod lora;
mod memory;
mod optim;
mod policy;
mod ranks;
mod rendezvous;
mod replay;
mod rl;
mod sft;
mod slow_workers;
mod telemetry;
