//! Attention of every head by itself, which calibration chooses heads by: a teacher-forced pass of its own, so that the passes that
//! train and generate carry nothing of it.

use std::rc::Rc;

use tch::{Kind, Tensor};

use crate::attention::{AttentionSet, Capture};
use crate::decoder::SequenceAsk;
use crate::packed::PackedBatch;
use crate::tape::{Mode, Tape, Var};
use crate::vlm::Vlm;
use crate::{ModelError, Result};

impl Vlm {
    /// Rows `[S, layers, heads, V]` of every head over the image tokens of a packed group: row s is the mean over the response tokens
    /// of `sets[s]`, counted as [`PackedBatch::ranges`] does. Each token's row is a softmax over the image tokens only, in fp32 from
    /// post-rotary queries and keys, as eager attention renormalised over them. Not for gradients.
    ///
    /// # Errors
    /// Not one group, a group without an image, no set, an empty one, or a token that is not there.
    pub fn head_rows(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        sets: &[Vec<usize>],
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        if batch.image_tokens.len() != 1 || batch.image_tokens[0] == 0 {
            return Err(ModelError::input("rows of single heads are those of one group with an image"));
        }
        if sets.is_empty() || sets.iter().any(Vec::is_empty) {
            return Err(ModelError::input("rows of single heads need sets of tokens that are not empty"));
        }
        let mut tokens: Vec<usize> = sets.iter().flatten().copied().collect();
        tokens.sort_unstable();
        tokens.dedup();
        if let Some(token) = tokens.iter().find(|t| **t >= batch.len()) {
            return Err(ModelError::input(format!("token {token} is not among the {} of the group", batch.len())));
        }
        let (queries, device) = (tokens.len() as i64, self.device());
        let mut weights = vec![0f32; sets.len() * tokens.len()];
        for (row, set) in weights.chunks_exact_mut(tokens.len()).zip(sets) {
            for token in set {
                let at = tokens.partition_point(|t| t < token);
                row[at] += 1.0 / set.len() as f32;
            }
        }
        let index: Vec<i64> = tokens.iter().map(|t| *t as i64).collect();
        let index = Tensor::from_slice(&index).to_device(device);
        let layers = self.config().text.num_hidden_layers;
        let capture = Capture {
            set: AttentionSet::new(&(0..layers).collect::<Vec<_>>(), &[]),
            // Of one group, an index into `B * L` is a position.
            queries: batch.input_index.index_select(0, &index).view([1, queries]),
            image_index: batch.image_index.shallow_clone(),
            image_valid: batch.image_valid.shallow_clone(),
            differentiable: false,
            pool: Some(Tensor::from_slice(&weights).view([1, -1, queries]).to_device(device)),
        };
        let rows = Some(batch.predict_index.narrow(0, 0, 1));
        let ask = SequenceAsk { capture: Some(Rc::new(capture)), rows, ..SequenceAsk::default() };
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let mut tape = Tape::new(Mode::Graph);
        let out =
            self.sequences(&mut tape, &batch.tokens, features.as_ref(), &batch.positions, self.tree(batch), ask)?;
        let by_layer: Vec<&Tensor> = out.attention.iter().map(|rows| &rows.tensor).collect();
        // [layers, 1, heads, S, V]
        Ok(Tensor::stack(&by_layer, 0).squeeze_dim(1).permute([2, 0, 1, 3]).to_kind(Kind::Float).contiguous())
    }
}
