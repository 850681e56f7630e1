//! A forward and backward pass over one micro-batch, with the hooks that gather parameters and reduce gradients; both stages run it.

use std::rc::Rc;

use tch::Tensor;
use unveil_model::{AdapterDropout, CaptureSpec, PackedBatch, PackedGroup, Tape, TapeMode, Var, Vlm};

use crate::batch::pixel_batch;
use crate::error::Result;
use crate::micro_batch::{BatchItem, Division};
use crate::shard::{HookedPass, PassHooks};

/// Rows of logits computed at a time under recomputation.
const HEAD_ROWS: i64 = 1024;

/// A forward pass over one micro-batch, from whose outputs a loss is computed. A rank without a micro-batch computes nothing, but
/// takes part in the collective calls.
pub(crate) struct ForwardPass<'a, O> {
    pass: Rc<HookedPass>,
    /// `None` on a rank without a micro-batch.
    pub outputs: Option<O>,
    tape: Tape<'a>,
}

impl<'a, O> ForwardPass<'a, O> {
    /// Runs a forward pass under `hooks`; `compute` records it on the tape.
    ///
    /// # Errors
    /// Returns the error of `compute`, or [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn run(
        hooks: &PassHooks,
        mode: TapeMode,
        compute: impl FnOnce(&mut Tape<'a>) -> Result<Option<O>>,
    ) -> Result<Self> {
        let pass = hooks.begin()?;
        let mut tape = Tape::new(mode);
        tape.set_layer_hook(pass.layer_hook());
        let outputs = compute(&mut tape)?;
        pass.end_forward()?;
        Ok(Self { pass, outputs, tape })
    }

    /// Backpropagates `loss`, which was computed from this pass, and adds the gradients to the reducer; `last` marks the last pass of
    /// the mini-batch.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn backward(self, loss: Option<&Tensor>, last: bool) -> Result<()> {
        self.pass.begin_backward(last);
        if let Some(loss) = loss {
            loss.f_backward()?;
            self.tape.backward()?;
        }
        self.pass.end_backward()
    }
}

/// Returns how activations are kept in passes with gradients under `hooks`.
pub(crate) fn tape_mode(recompute: bool, hooks: &PassHooks) -> TapeMode {
    match (recompute, hooks.by_layer) {
        (true, _) => TapeMode::Recompute,
        (false, true) => TapeMode::Segments,
        (false, false) => TapeMode::Graph,
    }
}

/// Returns the number of rows of `hidden` for which logits are computed at a time.
pub(crate) fn head_rows(mode: TapeMode, hidden: &Var) -> i64 {
    let rows = hidden.tensor.size()[0];
    if mode == TapeMode::Recompute { HEAD_ROWS.min(rows) } else { rows }
}

/// Options of a pass.
#[derive(Default)]
pub(crate) struct PassOptions {
    /// Attention to capture.
    pub capture: Option<CaptureSpec>,
    /// Dropout of the adapters; it stays set for the backward pass.
    pub dropout: Option<Dropout>,
}

/// Dropout of the adapters in a pass.
pub(crate) struct Dropout {
    pub rate: f64,
    /// Key of each item of the micro-batch.
    pub keys: Vec<u64>,
}

/// Returns the key of every position of a batch with rows of `length` positions: that of its item, and its place in it. Padding has key 0.
fn position_keys(groups: &[PackedGroup], keys: &[u64], length: i64, division: Division) -> Vec<i64> {
    let mut out = Vec::new();
    for (row, (group, key)) in groups.iter().zip(keys).enumerate() {
        let count = group.prompt.tokens.len() + group.responses.iter().map(Vec::len).sum::<usize>();
        let place = |i: usize| key.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)).cast_signed();
        out.extend((0..count).map(place));
        if division != Division::Packed {
            out.resize((row + 1) * length as usize, 0);
        }
    }
    out
}

/// Records the forward pass of a micro-batch on `tape`. Returns the hidden states that predict each response token, the attention rows if
/// they are captured, and the tokens.
///
/// # Errors
/// Returns an error of the model if the inputs do not fit it.
pub(crate) fn record_forward<'a, T: BatchItem>(
    vlm: &'a Vlm,
    tape: &mut Tape<'a>,
    micro_batch: &[&T],
    division: Division,
    options: PassOptions,
) -> Result<(Var, Option<Var>, Tensor)> {
    let PassOptions { capture, dropout } = options;
    let groups: Vec<PackedGroup> = micro_batch.iter().map(|item| item.packed().clone()).collect();
    let batch = match division {
        Division::Packed => PackedBatch::build_row(&groups, vlm.config(), vlm.device())?,
        Division::LittlePadding | Division::Padded => PackedBatch::build(&groups, vlm.config(), vlm.device())?,
    };
    if let (Some(Dropout { rate, keys }), Some(adapters)) = (dropout, vlm.adapters()) {
        let keys = position_keys(&groups, &keys, batch.tokens.size()[1], division);
        let keys = Tensor::f_from_slice(&keys)?.f_to_device(vlm.device())?;
        adapters.set_dropout(Some(AdapterDropout::new(rate, keys, &batch.predict_index)))?;
    }
    let inputs = micro_batch.iter().map(|item| item.input());
    let images = pixel_batch(inputs, vlm.config().vision.patch_len(), vlm.device())?;
    let images = images.as_ref().map(|(pixels, grids)| (pixels, grids.as_slice()));
    let (hidden, attention) = vlm.train_packed(tape, &batch, images, capture)?;
    Ok((hidden, attention, batch.targets))
}
