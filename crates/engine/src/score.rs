//! Teacher forcing: log-probabilities and attention of given responses, in packed forward passes.

use std::borrow::Borrow;

use tch::{Kind, Tensor};
use unveil_model::{CaptureSpec, PackedBatch, PackedGroup, Vlm, log_softmax};

use crate::engine::to_host;
use crate::request::{AttentionRows, ScoreRequest, ScoredResponse};
use crate::{Engine, EngineError, Result};

impl<V: Borrow<Vlm>> Engine<V> {
    /// Scores the responses of every group with the current weights, in the order of `requests`.
    ///
    /// `temperature` is that of the sampling (0 counts as 1). Every token is fed, so each has an attention row, including an end token.
    ///
    /// # Errors
    /// See [`Engine::check_score_request`]; [`EngineError::Model`] or [`EngineError::Torch`] if the model fails.
    pub fn score(&mut self, requests: &[ScoreRequest], temperature: f64) -> Result<Vec<Vec<ScoredResponse>>> {
        let _guard = tch::no_grad_guard();
        requests.iter().try_for_each(|r| self.check_score_request(r))?;
        let mut scored: Vec<Vec<ScoredResponse>> =
            requests.iter().map(|r| vec![ScoredResponse::default(); r.responses.len()]).collect();
        let non_empty: Vec<usize> =
            (0..requests.len()).filter(|&i| requests[i].responses.iter().any(|r| !r.is_empty())).collect();
        let length = |i: &usize| {
            requests[*i].input.prompt.tokens.len() + requests[*i].responses.iter().map(Vec::len).sum::<usize>()
        };
        let mut remaining = non_empty.as_slice();
        while !remaining.is_empty() {
            let (chunk, rest) = remaining.split_at(self.count_per_pass(remaining, length));
            self.score_chunk(requests, chunk, temperature, &mut scored)?;
            remaining = rest;
        }
        Ok(scored)
    }

    /// Checks responses to score, and their prompt.
    ///
    /// # Errors
    /// Returns [`EngineError::Request`] if a response has an invalid token; see also [`Engine::check_input`].
    pub fn check_score_request(&self, r: &ScoreRequest) -> Result<()> {
        let config = self.vlm().config();
        let vocab = config.text.vocab_size;
        let placeholders = [config.image_token_id, config.video_token_id];
        self.check_input(&r.input, r.responses.iter().map(Vec::len).max().unwrap_or(0))?;
        let invalid = |message: String| Err(EngineError::request(&r.input.id, message));
        if let Some(id) = r.responses.iter().flatten().find(|&&t| i64::from(t) >= vocab) {
            return invalid(format!("response token {id} is outside the model's vocabulary of {vocab}"));
        }
        if r.responses.iter().flatten().any(|t| placeholders.contains(t)) {
            return invalid("a response contains an image or video placeholder".to_owned());
        }
        Ok(())
    }

    fn score_chunk(
        &mut self,
        requests: &[ScoreRequest],
        chunk: &[usize],
        temperature: f64,
        scored: &mut [Vec<ScoredResponse>],
    ) -> Result<()> {
        let features = self.encode(chunk.iter().map(|&i| &requests[i].input))?;
        let groups: Vec<PackedGroup> = chunk
            .iter()
            .map(|&i| PackedGroup {
                prompt: requests[i].input.prompt.clone(),
                responses: requests[i].responses.iter().filter(|r| !r.is_empty()).cloned().collect(),
            })
            .collect();
        let vlm = self.vlm.borrow();
        let batch = PackedBatch::build(&groups, vlm.config(), vlm.device())?;
        let capture = self.options.capture.clone().map(|set| CaptureSpec { set, differentiable: false });
        let packed = vlm.forward_packed(&batch, features.as_ref(), capture)?;
        let log_probs = log_softmax(&vlm.lm_head(&packed.hidden), temperature, &self.banned);
        let logprobs = to_host(&log_probs.f_gather(-1, &batch.targets.f_unsqueeze(-1)?, false)?)?;
        let greedy = Vec::<i64>::try_from(log_probs.f_argmax(-1, false)?.f_to_kind(Kind::Int64)?)?;
        let width = |a: &Tensor| a.size().last().copied().unwrap_or(0) as usize;
        let attention = packed.attention.map(|a| to_host(&a).map(|values| (width(&a), values))).transpose()?;
        for (g, &i) in chunk.iter().enumerate() {
            let cells = batch.image_tokens[g];
            let responses = requests[i].responses.iter().enumerate();
            let indices = responses.filter(|(_, r)| !r.is_empty()).map(|(index, _)| index);
            for (index, range) in indices.zip(&batch.ranges[g]) {
                let rows = attention.as_ref().filter(|_| cells > 0).map(|(width, values)| AttentionRows {
                    cells,
                    values: range.clone().flat_map(|t| &values[t * width..t * width + cells]).copied().collect(),
                });
                scored[i][index] = ScoredResponse {
                    logprobs: logprobs[range.clone()].to_vec(),
                    greedy: greedy[range.clone()].iter().map(|&t| t as u32).collect(),
                    attention: rows,
                };
            }
        }
        Ok(())
    }
}
