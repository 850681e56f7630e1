//! Attention of every single head, from which calibration selects heads: a separate teacher-forced pass, so that training and generation
//! do not pay for it.

use std::rc::Rc;

use tch::{Kind, Tensor};

use crate::decoder::SequenceOptions;
use crate::layers::attention::{AttentionSet, Capture};
use crate::training::packed::PackedBatch;
use crate::vlm::Vlm;
use crate::{ModelError, Result};

impl Vlm {
    /// Returns the attention rows `[S, layers, heads, V]` of every head over the image tokens of a packed group: row s is the mean over
    /// the response tokens `sets[s]`, which are indices as in [`PackedBatch::ranges`]. The row of a token is a softmax over the image
    /// tokens only, in fp32 from post-rotary queries and keys, like eager attention renormalised over them. Has no gradient.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] unless the batch is one group with an image and all sets are non-empty sets of existing tokens.
    pub fn head_rows(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        sets: &[Vec<usize>],
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        if batch.image_tokens.len() != 1 || batch.image_tokens[0] == 0 {
            return Err(ModelError::input("attention of single heads needs a batch of one group with an image"));
        }
        if sets.is_empty() || sets.iter().any(Vec::is_empty) {
            return Err(ModelError::input("attention of single heads needs sets of tokens that are not empty"));
        }
        let mut tokens: Vec<usize> = sets.iter().flatten().copied().collect();
        tokens.sort_unstable();
        tokens.dedup();
        if let Some(token) = tokens.iter().find(|t| **t >= batch.len()) {
            return Err(ModelError::input(format!(
                "token {token} does not exist: the group has {} response tokens",
                batch.len()
            )));
        }
        let queries = tokens.len() as i64;
        let device = self.device();
        let mut weights = vec![0f32; sets.len() * tokens.len()];
        for (row, set) in weights.chunks_exact_mut(tokens.len()).zip(sets) {
            for token in set {
                let column = tokens.partition_point(|t| t < token);
                row[column] += 1.0 / set.len() as f32;
            }
        }
        let index: Vec<i64> = tokens.iter().map(|t| *t as i64).collect();
        let index = Tensor::from_slice(&index).to_device(device);
        let layers = self.config().text.num_hidden_layers;
        let capture = Capture {
            set: AttentionSet::new(&(0..layers).collect::<Vec<_>>(), &[]),
            // In a batch of one group, an index into `B * L` is a position.
            queries: batch.input_index.index_select(0, &index).view([1, queries]),
            image_index: batch.image_index.shallow_clone(),
            image_valid: batch.image_valid.shallow_clone(),
            differentiable: false,
            pool: Some(Tensor::from_slice(&weights).view([1, -1, queries]).to_device(device)),
        };
        let rows = Some(batch.predict_index.narrow(0, 0, 1));
        let options = SequenceOptions { capture: Some(Rc::new(capture)), rows, ..SequenceOptions::default() };
        let out = self.infer_packed(batch, image_features, options)?;
        let by_layer: Vec<&Tensor> = out.attention.iter().map(|rows| &rows.tensor).collect();
        // [layers, 1, heads, S, V]
        Ok(Tensor::stack(&by_layer, 0).squeeze_dim(1).permute([2, 0, 1, 3]).to_kind(Kind::Float).contiguous())
    }
}
