//! Tests of the learner through its public interface, most of them over real gRPC or with real processes.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod asynchrony;
mod checkpoint_damage;
mod common;
mod dataset;
mod dynamic_sampling;
mod lora;
mod rank_checkpoints;
mod rendezvous;
mod rl;
mod sft;
mod sft_lora;
mod sft_ranks;
mod sharded_broadcast;
mod slow_workers;
mod telemetry;
