//! Prompts and requests for the tests of this crate.

use std::sync::Arc;

use unveil_core::Sampling;
use unveil_model::Vlm;
use unveil_testkit_model::image_prompt;

use crate::{GroupRequest, PromptInput};

/// Creates prompt `k`; see [`image_prompt`].
pub(crate) fn input(vlm: &Vlm, k: usize) -> PromptInput {
    let (prompt, patches) = image_prompt(vlm, k);
    PromptInput { id: format!("g{k}"), prompt, patches: Arc::new(patches), hashes: vec![] }
}

/// Creates a request for prompt `k`.
pub(crate) fn request(vlm: &Vlm, k: usize, temperature: f64) -> GroupRequest {
    let sampling = Sampling { n: 4, temperature, max_new_tokens: 12, seed: 5, ..Default::default() };
    GroupRequest { input: input(vlm, k), key: 100 + k as u64, sampling, stop: None }
}
