//! What tests share: where Python and data sets are, a sandbox in which the built programs run, their processes, the files of a run, small disks, an S3 server,
//! and what goes wrong: an HTTP server that misbehaves when told to, the network between two roles, a store on a bad day.
//!
//! Everything a sandbox starts is ended when it is dropped, and nothing outside it is touched. Helpers panic with a message
//! that says what to do: this crate serves tests only.

mod disk;
mod link;
mod paths;
mod process;
mod run;
mod s3;
mod sandbox;
mod store;
mod web;

pub use disk::SmallDisk;
pub use link::{Link, Weather};
pub use paths::{bccd, binary, python, workspace};
pub use process::{Finished, Found, Process};
pub use run::{Lineage, TrainStep, committed, events, events_of, json_lines, read_json};
pub use s3::S3;
pub use sandbox::Sandbox;
pub use store::{StoreCall, StoreFault, StoreProxy};
pub use web::{WebReply, WebRequest, WebServer};
