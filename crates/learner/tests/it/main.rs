//! Tests of the learner through its public interface, most of them over real gRPC or with real processes.

mod asynchrony;
mod checkpoint_damage;
mod common;
mod lora;
mod rank_checkpoints;
#[allow(dead_code)]
#[path = "../../../trainer/tests/it/rank_processes.rs"]
mod rank_processes;
mod rendezvous;
mod rl;
mod sft;
mod sharded_broadcast;
mod slow_workers;
mod telemetry;
