//! Wire types generated from proto/, and conversions to and from the domain types. Must not depend on: tch.

mod convert;
pub mod weights;

pub use convert::{ConvertError, attention_from_wire, attention_to_wire, breakdown_from_wire, breakdown_to_wire};
pub use convert::{box_form_from_wire, box_form_to_wire};
pub use convert::{group_from_wire, group_to_wire, response_from_wire, response_to_wire};
pub use convert::{sampling_from_wire, sampling_to_wire, verdict_name};

/// Version 1 of the protocol.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("unveil.v1");
}

/// Encoded file descriptor set, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
