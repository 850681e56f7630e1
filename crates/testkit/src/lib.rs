//! What tests share: where Python and data sets are, a sandbox in which the built programs run, their processes, the files of a run,
//! small disks, a stand-in for the GPU driver, hosts with addresses of their own, an object store, a Slurm cluster, a certificate authority, a collector of spans, a reader
//! of pages of metrics, and what goes wrong: an HTTP server that misbehaves when told to, the network between two roles, a store on a bad day.
//!
//! Everything a sandbox starts is ended when it is dropped, and nothing outside it is touched. Helpers panic with a message
//! that says what to do: this crate serves tests only.

mod authority;
mod disk;
mod dispatch;
mod driver;
mod hosts;
mod link;
mod metrics;
mod paths;
mod process;
mod run;
mod sandbox;
mod slurm;
mod spans;
mod store;
mod store_server;
mod web;

pub use authority::Authority;
pub use disk::SmallDisk;
pub use dispatch::under_every_dispatch;
pub use driver::FakeDriver;
pub use hosts::Hosts;
pub use link::{Link, Weather};
pub use metrics::MetricsPage;
pub use paths::{bccd, binary, python, workspace};
pub use process::{Finished, Found, Process};
pub use run::{Lineage, TrainStep, committed, events, events_of, json_lines, read_json};
pub use sandbox::Sandbox;
pub use slurm::MiniSlurm;
pub use spans::{Span, SpanCollector};
pub use store::{StoreCall, StoreFault, StoreProxy};
pub use store_server::StoreServer;
pub use web::{WebReply, WebRequest, WebServer};
