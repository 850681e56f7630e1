//! Tests of the trainer through its public interface, against PyTorch, transformers and itself on one rank.

mod algorithms;
mod common;
mod lora;
mod memory;
mod optim;
mod policy;
mod rank_processes;
mod ranks;
mod replay;
