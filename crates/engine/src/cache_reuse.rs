//! Reuse of the KV cache of a batch that has ended: the next batch finds its memory, and the decode steps that were captured on it.

use std::borrow::Borrow;

use unveil_model::{CacheShape, Vlm};

use crate::{Engine, MaxSizes};

impl<V: Borrow<Vlm>> Engine<V> {
    /// Ends the batch, all of whose groups are done.
    pub(crate) fn end_batch(&mut self) {
        let ended = self.batch.take();
        self.spare = ended.filter(|_| self.options.reuse_cache && self.fixed_shapes());
    }

    /// Begins a batch that needs a cache of shape `wanted` with the cache of the last one, if that is large enough. Else frees that cache
    /// and returns the shape for a new one, which is given the sizes of both if that many groups fit: the next batches then fit more often.
    pub(crate) fn reuse_cache(&mut self, wanted: &CacheShape) -> Option<CacheShape> {
        let kind = self.vlm().cache_kind();
        let Some(spare) = self.spare.take().filter(|spare| spare.n == wanted.n && spare.cache.kind() == kind) else {
            return Some(*wanted);
        };
        let held = spare.cache.shape();
        let both = larger(&held, wanted);
        if both == held {
            self.batch = Some(spare);
            return None;
        }
        drop(spare);
        let sizes = MaxSizes { n: both.n, prompt: both.prompt, images: both.images, response: both.response };
        let fits = self.plan_memory("", &sizes).is_ok_and(|plan| plan.slots >= both.slots);
        Some(if fits { both } else { *wanted })
    }
}

/// Returns the larger of each size.
fn larger(a: &CacheShape, b: &CacheShape) -> CacheShape {
    CacheShape {
        slots: a.slots.max(b.slots),
        n: a.n,
        prompt: a.prompt.max(b.prompt),
        response: a.response.max(b.response),
        images: a.images.max(b.images),
    }
}

#[cfg(test)]
mod tests {
    use unveil_testkit_model::{EOS, model};
    use unveil_torch_ext::count_operations;

    use super::*;
    use crate::batch::Batch;
    use crate::fixture::request;
    use crate::{EngineOptions, GroupOutput, GroupRequest};

    fn options(reuse_cache: bool) -> EngineOptions {
        EngineOptions { fixed_shapes: true, reuse_cache, banned: vec![EOS], ..EngineOptions::default() }
    }

    fn tokens(outputs: &[GroupOutput]) -> Vec<Vec<u32>> {
        outputs.iter().flat_map(|o| &o.responses).map(|r| r.tokens.clone()).collect()
    }

    /// Generates the groups of each batch, and counts the tensors of zeros that each creates.
    fn generate(batches: &[&[GroupRequest]], reuse_cache: bool) -> (Vec<Vec<Vec<u32>>>, Vec<u64>, u64) {
        let mut engine = Engine::new(model(31), options(reuse_cache)).unwrap();
        let mut out = (Vec::new(), Vec::new(), 0);
        for batch in batches {
            let (outputs, counts) = count_operations(|| engine.generate(batch, None).unwrap()).unwrap();
            out.0.push(tokens(&outputs));
            out.1.push(counts.get("aten::zeros").copied().unwrap_or(0));
            assert!(engine.is_idle());
        }
        out.2 = engine.cache_bytes();
        out
    }

    #[test]
    fn batches_of_one_shape_share_a_cache() {
        let vlm = model(31);
        let requests: Vec<GroupRequest> = (0..5).map(|k| request(&vlm, k, 1.0)).collect();
        let batches = [&requests[1..], &requests[..4], &requests[..2], &requests[..]];
        let (fresh, zeros_of_fresh, bytes) = generate(&batches, false);
        assert_eq!(bytes, 0, "the cache is freed");
        let (reused, zeros, bytes) = generate(&batches, true);
        assert_eq!(reused, fresh, "the same tokens");
        let cache = 4 * vlm.config().text.num_hidden_layers as u64;
        assert_eq!(zeros[0], zeros_of_fresh[0]);
        // Groups with shorter prompts fit; more groups need a new cache.
        assert!(zeros[1] + cache <= zeros_of_fresh[1], "{zeros:?} {zeros_of_fresh:?}");
        assert_eq!(zeros[3], zeros_of_fresh[3]);
        assert!(bytes > 0);
    }

    #[test]
    fn another_number_of_responses_needs_another_cache() {
        let vlm = model(31);
        let four = request(&vlm, 0, 1.0);
        let mut two = four.clone();
        two.sampling.n = 2;
        let batches = [std::slice::from_ref(&four), std::slice::from_ref(&two), std::slice::from_ref(&four)];
        let (fresh, zeros_of_fresh, _) = generate(&batches, false);
        let (reused, zeros, _) = generate(&batches, true);
        assert_eq!((reused, zeros), (fresh, zeros_of_fresh));
    }

    #[test]
    fn sizes_are_kept_only_if_they_fit_together() {
        let vlm = model(31);
        let shape = |slots, prompt| CacheShape { slots, n: 4, prompt, response: 12, images: 4 };
        let mut engine = Engine::new(&vlm, options(true)).unwrap();
        let cache = vlm.cache(shape(2, 300), None, true).unwrap();
        engine.spare = Some(Batch::new(4, cache));
        let sizes = engine.reuse_cache(&shape(3, 20)).expect("too few slots");
        assert_eq!((sizes.slots, sizes.prompt), (3, 300));
        // Memory for three groups of short prompts only.
        let short = MaxSizes { n: 4, prompt: 20, images: 4, response: 12 };
        let plan = engine.plan_memory("", &short).unwrap();
        engine.options.memory_limit = Some(plan.activations + 3 * plan.per_group);
        engine.spare = Some(Batch::new(4, vlm.cache(shape(2, 300), None, true).unwrap()));
        assert_eq!(engine.reuse_cache(&shape(3, 20)), Some(shape(3, 20)));
        assert!(engine.spare.is_none());
        engine.spare = Some(Batch::new(4, vlm.cache(shape(2, 300), None, true).unwrap()));
        assert_eq!(engine.reuse_cache(&shape(1, 20)), None);
        assert!(engine.batch.is_some());
    }
}
