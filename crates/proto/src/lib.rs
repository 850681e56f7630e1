//! Wire types generated from proto/ and their conversions to the domain types. Must not know: tch.

mod convert;
pub mod weights;

pub use convert::{ConvertError, attention_from_wire, attention_to_wire, breakdown_from_wire, breakdown_to_wire};
pub use convert::{box_form_from_wire, box_form_to_wire};
pub use convert::{group_from_wire, group_to_wire, response_from_wire, response_to_wire};

/// Version 1 of the protocol.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("unveil.v1");
}

/// Encoded file descriptor set, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
