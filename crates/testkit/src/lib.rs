//! What tests share: where Python and data sets are, a sandbox in which the built programs run, their processes, the files of a run, small disks, an HTTP server
//! that misbehaves when told to, a collector of spans, a reader of pages of metrics.
//!
//! Everything a sandbox starts is ended when it is dropped, and nothing outside it is touched. Helpers panic with a message
//! that says what to do: this crate serves tests only.

mod disk;
mod metrics;
mod paths;
mod process;
mod run;
mod sandbox;
mod spans;
mod web;

pub use disk::SmallDisk;
pub use metrics::MetricsPage;
pub use paths::{bccd, binary, python, workspace};
pub use process::{Finished, Found, Process};
pub use run::{Lineage, TrainStep, committed, events, events_of, json_lines, read_json};
pub use sandbox::Sandbox;
pub use spans::{Span, SpanCollector};
pub use web::{WebReply, WebRequest, WebServer};
