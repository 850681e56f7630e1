//! Tests of both ends of the protocol over real gRPC and Gloo.

mod access;
mod broadcast;
mod common;
mod experience_server;
mod leases;
mod offered_broadcast;
