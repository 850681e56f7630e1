//! Shared test fixtures with tensors: tiny models and their directories, prompts, generated groups, ranks as processes, and a server that
//! publishes computed weights.
//!
//! Separate from `testkit`, because cargo would unify a feature of `testkit` over the workspace and link libtorch into the tests of crates
//! that must not depend on it. What needs more than a model has a feature, so that tests of the lower crates do not build the upper ones.
//! Helpers panic with a message: this crate serves tests only.

mod groups;
mod parameters;
mod tiny;

#[cfg(feature = "publishing")]
mod computed_weights;
#[cfg(feature = "publishing")]
mod experience;
#[cfg(feature = "publishing")]
mod publisher;
#[cfg(feature = "training")]
pub mod rank_processes;
#[cfg(feature = "training")]
mod rollout;
#[cfg(feature = "publishing")]
mod subscriber;

#[cfg(feature = "publishing")]
pub use computed_weights::{BROADCAST_TIMEOUT, DIFFERENCE, PATIENCE, version_checksum, version_weights};
#[cfg(feature = "publishing")]
pub use experience::{NoLeases, experience_settings, server_options};
pub use groups::{breakdown, low_tokens, record, text_input};
pub use parameters::{adapters, add_noise, bits, weights};
#[cfg(feature = "publishing")]
pub use publisher::WeightPublisher;
#[cfg(feature = "training")]
pub use rollout::{MAX_TOKENS, configured, input, lora_spec, rollout};
#[cfg(feature = "publishing")]
pub use subscriber::{ReceivedWeights, WeightSubscriber};
pub use tiny::{
    EOS, IMAGE, VOCAB, image_prompt, model, model_of, patches, tiny_spec, write_model, write_model_directory,
    write_model_of,
};
