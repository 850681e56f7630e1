//! Teacher forcing: log-probabilities and attention of given responses in one packed pass per group.

use std::borrow::Borrow;

use tch::{Kind, Tensor};
use unveil_model::{CaptureSpec, PackedBatch, PackedGroup, Vlm, log_softmax};

use crate::engine::host;
use crate::request::{AttentionRows, ScoreRequest, Scored};
use crate::{Engine, EngineError, Result};

impl<V: Borrow<Vlm>> Engine<V> {
    /// Scores the responses of every group under the present weights, in the order of `requests`.
    ///
    /// `temperature` is the one they were sampled at (0 counts as 1). Every token is fed, so there is an attention row for
    /// each, an end token included. Errors name the group.
    pub fn score(&mut self, requests: &[ScoreRequest], temperature: f64) -> Result<Vec<Vec<Scored>>> {
        let _guard = tch::no_grad_guard();
        requests.iter().try_for_each(|r| self.check_scored(r))?;
        let mut out: Vec<Vec<Scored>> = requests.iter().map(|r| vec![Scored::default(); r.responses.len()]).collect();
        let busy: Vec<usize> =
            (0..requests.len()).filter(|&i| requests[i].responses.iter().any(|r| !r.is_empty())).collect();
        let length = |i: &usize| {
            requests[*i].input.prompt.tokens.len() + requests[*i].responses.iter().map(Vec::len).sum::<usize>()
        };
        let mut rest = busy.as_slice();
        while !rest.is_empty() {
            let (chunk, later) = rest.split_at(self.share(rest, length));
            self.score_chunk(requests, chunk, temperature, &mut out)?;
            rest = later;
        }
        Ok(out)
    }

    /// Checks given responses and their prompt.
    ///
    /// # Errors
    /// Why they cannot be scored; the message names the group.
    pub fn check_scored(&self, r: &ScoreRequest) -> Result<()> {
        let config = self.vlm().config();
        let (vocab, placeholders) = (config.text.vocab_size, [config.image_token_id, config.video_token_id]);
        self.check(&r.input, r.responses.iter().map(Vec::len).max().unwrap_or(0))?;
        let refuse = |what: String| Err(EngineError::request(&r.input.id, what));
        if let Some(id) = r.responses.iter().flatten().find(|&&t| i64::from(t) >= vocab) {
            return refuse(format!("response token {id} is outside the model's vocabulary of {vocab}"));
        }
        if r.responses.iter().flatten().any(|t| placeholders.contains(t)) {
            return refuse("a response holds an image or video placeholder, for which there is no image".to_owned());
        }
        Ok(())
    }

    fn score_chunk(
        &mut self,
        requests: &[ScoreRequest],
        chunk: &[usize],
        temperature: f64,
        out: &mut [Vec<Scored>],
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
        let chosen = host(&log_probs.f_gather(-1, &batch.targets.f_unsqueeze(-1)?, false)?)?;
        let greedy = Vec::<i64>::try_from(log_probs.f_argmax(-1, false)?.f_to_kind(Kind::Int64)?)?;
        let width = |a: &Tensor| a.size().last().copied().unwrap_or(0) as usize;
        let attention = packed.attention.map(|a| host(&a).map(|values| (width(&a), values))).transpose()?;
        for (g, &i) in chunk.iter().enumerate() {
            let cells = batch.image_tokens[g];
            let slots = requests[i].responses.iter().enumerate().filter(|(_, r)| !r.is_empty()).map(|(index, _)| index);
            for (index, range) in slots.zip(&batch.ranges[g]) {
                let rows = attention.as_ref().filter(|_| cells > 0).map(|(width, values)| AttentionRows {
                    cells,
                    values: range.clone().flat_map(|t| &values[t * width..t * width + cells]).copied().collect(),
                });
                out[i][index] = Scored {
                    logprobs: chosen[range.clone()].to_vec(),
                    greedy: greedy[range.clone()].iter().map(|&t| t as u32).collect(),
                    attention: rows,
                };
            }
        }
        Ok(())
    }
}
