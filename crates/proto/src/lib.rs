//! Wire types generated from proto/, and conversions to and from the domain types. Must not depend on: tch.
//!
//! # Examples
//! The message of a peer is checked when it is converted:
//! ```
//! use unveil_core::{Finish, Response};
//! use unveil_proto::{ConvertError, response_from_wire, response_to_wire};
//!
//! let response = Response {
//!     index: 0,
//!     tokens: vec![17, 2],
//!     text: "no finding".to_owned(),
//!     logprobs: vec![-0.25, -0.5],
//!     versions: vec![4, 4],
//!     finish: Finish::Stop,
//! };
//! let mut wire = response_to_wire(&response, &[], None);
//! assert_eq!(response_from_wire(wire.clone()), Ok(response));
//!
//! wire.logprobs.pop();
//! let error = response_from_wire(wire).unwrap_err();
//! assert_eq!(error, ConvertError::Length { field: "logprobs", found: 1, expected: 2 });
//! ```

mod convert;

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
