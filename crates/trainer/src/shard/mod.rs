//! Trainer state sharded over ranks (ZeRO, arXiv 1910.02054): the mesh of ranks, the layout of what each rank owns, and the hooks
//! that all-gather parameters and reduce gradients around the layers of a pass.

mod gradients;
mod layout;
mod pass;
mod ranks;
mod sharded_parameters;

pub(crate) use gradients::{GradientReducer, ReduceTiming};
pub use layout::ParameterSlice;
pub(crate) use layout::{OwnedRange, ParameterSlot, ShardLayout, layer_of};
pub(crate) use pass::{HookedPass, PassHooks};
pub(crate) use ranks::wait;
pub use ranks::{Ranks, ZeroStage};
pub(crate) use sharded_parameters::ShardedParameters;
