//! Tests of both ends of the protocol over real gRPC and Gloo.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod access;
mod broadcast;
mod experience_server;
mod leases;
mod offered_broadcast;
