//! Attention of every single head over given responses, for calibration, in a separate forward pass.

use std::borrow::Borrow;

use unveil_model::{PackedBatch, PackedGroup, Vlm};

use crate::engine::to_host;
use crate::request::ScoreRequest;
use crate::{Engine, EngineError, Result};

/// Mean attention row over some response tokens, for every head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadRows {
    /// Number of heads per layer.
    pub heads: usize,
    /// Number of image tokens, the length of a row.
    pub cells: usize,
    /// Rows by layer, then head; each sums to 1.
    pub values: Vec<f32>,
}

impl HeadRows {
    /// Returns `(layer, head, row)` of every head, counted from 0.
    pub fn rows(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let heads = self.heads.max(1);
        self.values.chunks_exact(self.cells.max(1)).enumerate().map(move |(i, row)| (i / heads, i % heads, row))
    }
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Returns, for each response i and every layer and head, the mean attention row over the tokens with the indices `tokens[i]`,
    /// regardless of the capture options; `None` if `tokens[i]` is empty. The request runs in one forward pass, and each response needs
    /// layers * heads * image tokens values.
    ///
    /// # Errors
    /// Returns [`EngineError::Request`] for a prompt without an image or a token index out of range; see also [`Engine::score`].
    pub fn head_rows(&mut self, request: &ScoreRequest, tokens: &[Vec<usize>]) -> Result<Vec<Option<HeadRows>>> {
        let _guard = tch::no_grad_guard();
        self.check_score_request(request)?;
        let invalid = |message: String| Err(EngineError::request(&request.input.id, message));
        if tokens.len() != request.responses.len() {
            return invalid(format!("{} lists of tokens for {} responses", tokens.len(), request.responses.len()));
        }
        if request.input.prompt.grids.is_empty() {
            return invalid("the prompt has no image".to_owned());
        }
        let mut result: Vec<Option<HeadRows>> = vec![None; tokens.len()];
        let selected: Vec<usize> = (0..tokens.len()).filter(|&i| !tokens[i].is_empty()).collect();
        if selected.is_empty() {
            return Ok(result);
        }
        // Token indices in the packed batch, where the selected responses follow each other.
        let mut packed_tokens = Vec::with_capacity(selected.len());
        let mut offset = 0;
        for &i in &selected {
            let count = request.responses[i].len();
            if let Some(token) = tokens[i].iter().find(|t| **t >= count) {
                return invalid(format!("token {token} is not among the {count} of response {i}"));
            }
            packed_tokens.push(tokens[i].iter().map(|t| offset + t).collect::<Vec<usize>>());
            offset += count;
        }
        let features = self.encode(std::iter::once(&request.input))?;
        let vlm = self.vlm.borrow();
        let group = PackedGroup {
            prompt: request.input.prompt.clone(),
            responses: selected.iter().map(|&i| request.responses[i].clone()).collect(),
        };
        let batch = PackedBatch::build(&[group], vlm.config(), vlm.device())?;
        let rows = vlm.head_rows(&batch, features.as_ref(), &packed_tokens)?;
        let heads = vlm.config().text.num_attention_heads.max(0) as usize;
        let cells = batch.image_tokens[0];
        for (index, &i) in selected.iter().enumerate() {
            result[i] = Some(HeadRows { heads, cells, values: to_host(&rows.get(index as i64))? });
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use unveil_model::AttentionSet;
    use unveil_testkit_model::{EOS, model};

    use super::*;
    use crate::fixture::{input, request};
    use crate::{EngineOptions, PromptInput};

    fn is_close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-5)
    }

    /// The attention that generation captures of some heads is the mean of the single heads.
    #[test]
    fn captured_attention_is_the_mean_of_single_heads() {
        let vlm = model(1);
        let chosen = [[1, 2], [1, 0], [3, 1]];
        let options = EngineOptions { capture: Some(AttentionSet::new(&[], &chosen)), ..Default::default() };
        let mut engine = Engine::new(&vlm, options).unwrap();
        let generated = engine.generate(&[request(&vlm, 1, 0.9)], None).unwrap();
        let responses: Vec<Vec<u32>> = generated[0].responses.iter().map(|r| r.tokens.clone()).collect();
        // The first and the last fed token, of all responses but one.
        let fed = |i: usize| generated[0].responses[i].attention.as_ref().map_or(0, |a| a.len());
        let tokens = |i: usize| if i == 1 { Vec::new() } else { (0..fed(i)).step_by(fed(i).max(2) - 1).collect() };
        let tokens: Vec<Vec<usize>> = (0..4).map(tokens).collect();
        assert!(tokens.iter().filter(|t| t.len() > 1).count() > 1, "{tokens:?}");
        let request = ScoreRequest { input: input(&vlm, 1), responses };
        let rows = engine.head_rows(&request, &tokens).unwrap();
        assert!(rows[1].is_none());
        let text = &vlm.config().text;
        for (i, rows) in rows.iter().enumerate().filter_map(|(i, r)| Some((i, r.as_ref()?))) {
            assert_eq!(rows.rows().count(), text.num_hidden_layers * text.num_attention_heads as usize);
            let mut mean = vec![0f32; rows.cells];
            let mut captured = vec![0f32; rows.cells];
            for (_, _, row) in rows.rows().filter(|(layer, head, _)| chosen.contains(&[*layer, *head])) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                mean.iter_mut().zip(row).for_each(|(m, p)| *m += p / 3.0);
            }
            let attention = generated[0].responses[i].attention.as_ref().unwrap();
            for token in &tokens[i] {
                let count = tokens[i].len() as f32;
                captured.iter_mut().zip(attention.row(*token).unwrap()).for_each(|(c, p)| *c += p / count);
            }
            assert!(is_close(&mean, &captured), "response {i}: {mean:?} {captured:?}");
        }
        assert_eq!(engine.head_rows(&request, &vec![vec![]; 4]).unwrap(), vec![None; 4]);
    }

    #[test]
    fn invalid_requests_name_the_group() {
        let vlm = model(4);
        let mut engine = Engine::new(&vlm, EngineOptions::default()).unwrap();
        let given = ScoreRequest { input: input(&vlm, 0), responses: vec![vec![5, 6, EOS]] };
        let without_image = PromptInput {
            prompt: unveil_core::Prompt { tokens: vec![1, 2], grids: vec![] },
            patches: Default::default(),
            ..input(&vlm, 0)
        };
        let mut error_of = |request: &ScoreRequest, tokens: &[Vec<usize>]| {
            let text = engine.head_rows(request, tokens).unwrap_err().to_string();
            assert!(text.contains("g0"), "{text}");
            text
        };
        assert!(error_of(&given, &[]).contains("0 lists"));
        assert!(error_of(&given, &[vec![3]]).contains("token 3 is not among the 3"));
        assert!(error_of(&ScoreRequest { input: without_image, ..given.clone() }, &[vec![0]]).contains("no image"));
        let unknown_token = ScoreRequest { responses: vec![vec![999]], ..given };
        assert!(error_of(&unknown_token, &[vec![0]]).contains("999"));
    }
}
