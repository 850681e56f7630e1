//! Shared test support: paths of Python and the data sets, a sandbox for the built programs and their processes, readers of run files and
//! metrics pages, small disks, a fake GPU driver, hosts with their own addresses, an object store, a Slurm cluster, a certificate
//! authority, a span collector, and sources of failure: a misbehaving HTTP server, a network link, a faulty store.
//!
//! A sandbox ends everything that was started in it when it is dropped, and touches nothing outside. Helpers panic with a message that says
//! what to do: this crate serves tests only.

#![allow(clippy::unwrap_used, reason = "fixtures of tests may panic")]
#![allow(clippy::disallowed_methods, reason = "fixtures find Python, data and stores by environment variables")]

mod authority;
mod disk;
mod dispatch;
mod fake_driver;
mod hosts;
mod loopback;
mod metrics;
mod network_link;
mod own_process;
mod paths;
mod process;
mod run_files;
mod sandbox;
mod slurm;
mod spans;
mod store_proxy;
mod store_server;
mod web_server;

pub use authority::Authority;
pub use disk::SmallDisk;
pub use dispatch::under_every_dispatch;
pub use fake_driver::FakeDriver;
pub use hosts::Hosts;
pub use loopback::free_address;
pub use metrics::MetricsPage;
pub use network_link::{NetworkCondition, NetworkLink};
pub use own_process::{KilledOnDrop, ignored_test};
pub use paths::{bccd, binary, example, python, workspace};
pub use process::{Finished, FoundProcess, Process};
pub use run_files::{Lineage, TrainStep, committed_steps, events, events_of, json_lines, read_json};
pub use sandbox::{Sandbox, run_args};
pub use slurm::MiniSlurm;
pub use spans::{Span, SpanCollector};
pub use store_proxy::{StoreCall, StoreFault, StoreProxy};
pub use store_server::StoreServer;
pub use web_server::{WebReply, WebRequest, WebServer};
