//! Decode steps of a [`GroupCache`]: their inputs, cache writes, and replay of recorded steps.

use tch::{Kind, Tensor};
use unveil_torch_ext::{CudaGraph, GraphPool};

use crate::generation::cache::GroupCache;
use crate::generation::decode_slots::{CacheWrite, StepSlots, StepTensors};
use crate::generation::graph::{Recording, StepResult};
use crate::layers::ops::minus_infinity_where;

/// Granularity, in tokens, of the attended suffix length in a cache with fixed shapes.
const SUFFIX_STEP: i64 = 64;

impl GroupCache {
    /// Returns the inputs of a step that feeds `rows` (ascending). A cache with fixed shapes must feed all rows; a full row overwrites its
    /// last token then, so that only the results of rows that continue may be used.
    pub(crate) fn step_slots(&self, rows: &[usize]) -> StepSlots {
        let n = self.shape().n;
        let last = self.shape().response as i64 - 1;
        StepSlots {
            positions: rows.iter().map(|r| self.slots[r / n].next + self.lengths[*r]).collect(),
            rows: rows.iter().map(|r| *r as i64).collect(),
            offsets: rows.iter().map(|r| self.lengths[*r].min(last)).collect(),
        }
    }

    /// Returns [`GroupCache::step_slots`] as tensors, with the masks of the step.
    pub(crate) fn step_tensors(&self, rows: &[usize]) -> StepTensors {
        let StepSlots { positions, rows: index, offsets } = self.step_slots(rows);
        let mut lengths = self.lengths.clone();
        rows.iter().zip(&offsets).for_each(|(r, offset)| lengths[*r] = offset + 1);
        let mut used = lengths.iter().copied().max().unwrap_or(1).max(1);
        if self.fixed_shapes() {
            used = ((used + SUFFIX_STEP - 1) / SUFFIX_STEP * SUFFIX_STEP).min(self.shape().response as i64);
        }
        let all = rows.len() == self.rows();
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(self.device);
        let equal_lengths = all && !self.fixed_shapes() && lengths.iter().all(|s| *s == used);
        let suffix_bias = (!equal_lengths).then(|| {
            // A row that was never fed attends to its first offset, so that its softmax is finite.
            let lengths = tensor(&lengths.iter().map(|s| (*s).max(1)).collect::<Vec<_>>()).unsqueeze(1);
            let ahead = Tensor::arange(used, (Kind::Int64, self.device)).unsqueeze(0).ge_tensor(&lengths);
            minus_infinity_where(&ahead, Kind::Float).view([-1, 1, 1, used])
        });
        StepTensors {
            positions: tensor(&positions),
            rows: (!all).then(|| tensor(&index)),
            write: if equal_lengths {
                CacheWrite::Column(used - 1)
            } else {
                CacheWrite::Scatter(tensor(&index), tensor(&offsets))
            },
            used,
            suffix_bias,
        }
    }

    /// Writes keys and values `[A, Hkv, 1, d]` of this step.
    pub(crate) fn write(&self, layer: usize, step: &StepTensors, k: &Tensor, v: &Tensor) {
        let store = self.layer(layer);
        for (target, new) in [(&store.suffix_k, k), (&store.suffix_v, v)] {
            match &step.write {
                CacheWrite::Column(offset) => target.narrow(2, *offset, 1).copy_(new),
                CacheWrite::Scatter(rows, offsets) => {
                    let mut target = target.shallow_clone();
                    let _ = target.index_put_(
                        &[Some(rows), None, Some(offsets)],
                        &new.squeeze_dim(2).to_kind(target.kind()),
                        false,
                    );
                }
            }
        }
    }
}

/// Runs one step.
type StepRunner<'r> = &'r dyn Fn(&Tensor, &GroupCache, &StepTensors) -> StepResult;
/// Records one step with memory of a pool.
type Recorder<'r> = &'r dyn Fn(&GraphPool, &dyn Fn() -> StepResult) -> Recording;

/// Runs one step of a cache with fixed shapes on GPU `gpu`. The first step of a shape runs normally and is then recorded.
pub(crate) fn replayed_step(
    cache: &mut GroupCache,
    gpu: usize,
    tokens: &Tensor,
    inputs: StepTensors,
    run: StepRunner<'_>,
) -> StepResult {
    run_or_replay(cache, tokens, inputs, run, &|pool, work| CudaGraph::record(gpu, pool, work))
}

fn run_or_replay(
    cache: &mut GroupCache,
    tokens: &Tensor,
    inputs: StepTensors,
    run: StepRunner<'_>,
    record: Recorder<'_>,
) -> StepResult {
    if let Some(output) = cache.graphs.replay(tokens, &inputs) {
        return output;
    }
    let output = run(tokens, cache, &inputs)?;
    if !cache.graphs.should_record() {
        return Ok(output);
    }
    let tokens = tokens.copy();
    cache.graphs.refresh_pool();
    let recording = record(cache.graphs.pool(), &|| run(&tokens, cache, &inputs));
    cache.graphs.finish_recording(tokens, inputs, recording);
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::Device;
    use unveil_torch_ext::ExtError;

    use super::*;
    use crate::{CacheShape, preset};

    /// Returns the steps at which recording is attempted, if it always fails with `error`, and the last error of the cache.
    fn attempted_steps(steps: i64, error: &ExtError) -> (Vec<i64>, Option<String>) {
        let config = preset("qwen2_5_vl", "tiny").unwrap().config();
        let shape = CacheShape { slots: 1, n: 2, prompt: 3, response: 64, images: 0 };
        let mut cache = GroupCache::new(&config.text, shape, None, true, (Kind::Float, Device::Cpu)).unwrap();
        let attempted = Cell::new(false);
        let mut attempts = Vec::new();
        for step in 0..steps {
            attempted.set(false);
            let inputs = cache.step_tensors(&[0, 1]);
            let run = |_: &Tensor, _: &GroupCache, _: &StepTensors| Ok((Tensor::from(step), None));
            let refuse = |_: &GraphPool, _: &dyn Fn() -> StepResult| {
                attempted.set(true);
                Err(error.clone())
            };
            let tokens = Tensor::from_slice(&[4i64, 5]);
            let (hidden, _) = run_or_replay(&mut cache, &tokens, inputs, &run, &refuse).unwrap();
            assert_eq!(hidden.int64_value(&[]), step, "the step itself has run");
            cache.advance(&[0, 1]);
            attempts.extend(attempted.get().then_some(step));
        }
        (attempts, cache.graphs.last_error().map(str::to_owned))
    }

    #[test]
    fn failed_recordings_are_retried_with_back_off() {
        let error = ExtError::Refused { what: "record a CUDA graph", message: "capture invalidated".into() };
        let (attempts, last_error) = attempted_steps(40, &error);
        assert_eq!(attempts, [0, 5, 14, 31]);
        assert!(last_error.unwrap().contains("capture invalidated"));
        let missing = ExtError::Unavailable { library: "CUDA", reason: "it was left out".into() };
        assert_eq!(attempted_steps(40, &missing).0, [0], "a missing library is not tried again");
    }
}
