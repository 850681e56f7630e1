//! Decode steps as recorded graphs: on a GPU the hundreds of small operations of a step cost more to start than to run, so a step
//! is recorded once per shape and run again with new values in the same places.

use std::collections::HashMap;

use tch::Tensor;
use unveil_torch_ext::{CudaGraph, ExtError};

use crate::cache::GroupCache;
use crate::place::{Place, Write};
use crate::{Result, Vlm};

/// Recorded steps of one cache.
#[derive(Default)]
pub(crate) struct Graphs {
    steps: HashMap<i64, Recorded>,
    pub replayed: u64,
    tries: Tries,
}

impl Graphs {
    /// Forgets what was recorded, because tensors have moved.
    pub fn clear(&mut self) {
        self.steps.clear();
    }

    /// Why the newest recording failed; steps run one operation after another until one succeeds.
    pub fn fault(&self) -> Option<&str> {
        self.tries.fault.as_deref()
    }
}

/// When a recording that failed is tried again: what another thread or another process did in that moment may be over at the next one.
#[derive(Default)]
struct Tries {
    fault: Option<String>,
    failed: u32,
    /// Steps to go before the next try.
    wait: u64,
}

impl Tries {
    /// Steps before the second try; twice as many before each further one, since a try costs about as much as a step.
    const FIRST: u64 = 4;
    const LONGEST: u64 = 4096;

    /// Whether this step is to be recorded.
    fn due(&mut self) -> bool {
        let due = self.wait == 0;
        self.wait = self.wait.saturating_sub(1);
        due
    }

    fn failed(&mut self, fault: String, lasting: bool) {
        let wait = Self::FIRST.checked_shl(self.failed).unwrap_or(Self::LONGEST).min(Self::LONGEST);
        self.wait = if lasting { u64::MAX } else { wait };
        self.failed += 1;
        self.fault = Some(fault);
    }

    fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// One step: where it reads its values from, and where it leaves them.
struct Recorded {
    graph: CudaGraph,
    tokens: Tensor,
    place: Place,
    hidden: Tensor,
    attention: Option<Tensor>,
}

type Made = Result<(Tensor, Option<Tensor>)>;
/// Records one step.
type Record<'r> = &'r dyn Fn(&dyn Fn() -> Made) -> std::result::Result<(CudaGraph, Made), ExtError>;

/// One step of a steady cache. The first of a shape runs as it is and is then recorded.
pub(crate) fn step(vlm: &Vlm, cache: &mut GroupCache, gpu: usize, tokens: &Tensor, place: Place) -> Made {
    step_by(vlm, cache, tokens, place, &|work| CudaGraph::record(gpu, work))
}

fn step_by(vlm: &Vlm, cache: &mut GroupCache, tokens: &Tensor, place: Place, record: Record<'_>) -> Made {
    if let Some(recorded) = cache.graphs.steps.get_mut(&place.used) {
        recorded.tokens.f_copy_(tokens)?;
        recorded.place.take_values(&place)?;
        recorded.graph.replay()?;
        cache.graphs.replayed += 1;
        return Ok((recorded.hidden.shallow_clone(), recorded.attention.as_ref().map(Tensor::shallow_clone)));
    }
    let out = vlm.step(tokens, cache, &place)?;
    if !cache.graphs.tries.due() {
        return Ok(out);
    }
    let tokens = tokens.copy();
    match record(&|| vlm.step(&tokens, cache, &place)) {
        Ok((graph, Ok((hidden, attention)))) => {
            cache.graphs.tries.succeeded();
            let recorded = Recorded { graph, tokens, hidden, attention, place };
            cache.graphs.steps.insert(recorded.place.used, recorded);
        }
        Ok((_, Err(e))) => cache.graphs.tries.failed(e.to_string(), false),
        Err(e) => {
            let lasting = matches!(e, ExtError::Unavailable { .. });
            cache.graphs.tries.failed(e.to_string(), lasting);
        }
    }
    Ok(out)
}

impl Place {
    /// Takes over the values of another place of the same shape.
    fn take_values(&mut self, other: &Place) -> Result<()> {
        self.positions.f_copy_(&other.positions)?;
        if let (Some(mine), Some(new)) = (&mut self.suffix_bias, &other.suffix_bias) {
            mine.f_copy_(new)?;
        }
        if let (Write::Scatter(rows, slots), Write::Scatter(new_rows, new_slots)) = (&mut self.write, &other.write) {
            rows.f_copy_(new_rows)?;
            slots.f_copy_(new_slots)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::{Device, Kind};

    use super::*;
    use crate::{CacheShape, Family, InitSpec, Prompt, SpecialIds, init};

    /// Steps at which a recording is tried that fails every time with `error`.
    fn tries(steps: u64, error: &ExtError) -> (Vec<u64>, Option<String>) {
        tch::set_num_threads(1);
        let dir = tempfile::tempdir().unwrap();
        let special =
            SpecialIds { image_pad: 61, video_pad: 62, vision_start: 58, vision_end: 59, bos: None, eos: 60, pad: 63 };
        let family = Family::Qwen2_5Vl.name().into();
        init(&InitSpec { family, preset: "tiny".into(), vocab_size: 64, seed: 1, special }, dir.path()).unwrap();
        let vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        let _guard = tch::no_grad_guard();
        let prefill = vlm.prefill(&[Prompt { tokens: vec![1, 2, 3], grids: Vec::new() }], None).unwrap();
        let shape = CacheShape { slots: 1, n: 2, prompt: 3, response: 64, images: 0 };
        let mut cache = vlm.cache(shape, None, true).unwrap();
        cache.admit(&prefill, &[0]).unwrap();
        let (at, mut seen) = (Cell::new(0), Vec::new());
        for step in 0..steps {
            at.set(0);
            let place = cache.place(&[0, 1]);
            let refuse = |_: &dyn Fn() -> Made| {
                at.set(1);
                Err(error.clone())
            };
            let tokens = Tensor::from_slice(&[4i64, 5]);
            let (hidden, _) = step_by(&vlm, &mut cache, &tokens, place, &refuse).unwrap();
            assert_eq!(hidden.size()[0], 2, "the step itself has run");
            cache.advance(&[0, 1]);
            seen.extend((at.get() == 1).then_some(step));
        }
        (seen, cache.graphs.fault().map(str::to_owned))
    }

    #[test]
    fn a_recording_that_failed_is_tried_again_later() {
        let error = ExtError::Refused { what: "record a CUDA graph", message: "capture invalidated".into() };
        let (seen, fault) = tries(40, &error);
        assert_eq!(seen, [0, 5, 14, 31]);
        assert!(fault.unwrap().contains("capture invalidated"));
        let missing = ExtError::Unavailable { part: "CUDA", reason: "it was left out".into() };
        assert_eq!(tries(40, &missing).0, [0], "what is not there does not come");
    }

    #[test]
    fn tries_begin_anew_after_a_success_and_never_end() {
        let mut tries = Tries::default();
        for _ in 0..80 {
            tries.failed("x".into(), false);
            assert!(tries.wait <= Tries::LONGEST);
        }
        tries.succeeded();
        assert!(tries.due() && tries.fault.is_none());
        tries.failed("x".into(), false);
        assert_eq!(tries.wait, Tries::FIRST);
    }
}
