//! Decode steps as recorded graphs: on a GPU the hundreds of small operations of a step cost more to start than to run, so a step
//! is recorded once per shape and run again with new values in the same places.

use std::collections::HashMap;

use tch::Tensor;
use unveil_torch_ext::CudaGraph;

use crate::cache::GroupCache;
use crate::place::{Place, Write};
use crate::{Result, Vlm};

/// Recorded steps of one cache.
#[derive(Default)]
pub(crate) struct Graphs {
    steps: HashMap<i64, Recorded>,
    pub replayed: u64,
    /// Why recording does not work here; steps run one operation after another then.
    pub fault: Option<String>,
}

impl Graphs {
    /// Forgets what was recorded, because tensors have moved.
    pub fn clear(&mut self) {
        self.steps.clear();
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

/// One step of a steady cache. The first of a shape runs as it is and is then recorded.
pub(crate) fn step(
    vlm: &Vlm,
    cache: &mut GroupCache,
    gpu: usize,
    tokens: &Tensor,
    place: Place,
) -> Result<(Tensor, Option<Tensor>)> {
    if let Some(recorded) = cache.graphs.steps.get_mut(&place.used) {
        recorded.tokens.f_copy_(tokens)?;
        recorded.place.take_values(&place)?;
        recorded.graph.replay()?;
        cache.graphs.replayed += 1;
        return Ok((recorded.hidden.shallow_clone(), recorded.attention.as_ref().map(Tensor::shallow_clone)));
    }
    let out = vlm.step(tokens, cache, &place)?;
    if cache.graphs.fault.is_none() {
        let tokens = tokens.copy();
        let recorded = CudaGraph::record(gpu, || vlm.step(&tokens, cache, &place)).map_err(|e| e.to_string());
        match recorded.and_then(|(graph, made)| Ok((graph, made.map_err(|e| e.to_string())?))) {
            Ok((graph, (hidden, attention))) => {
                let recorded = Recorded { graph, tokens, hidden, attention, place };
                cache.graphs.steps.insert(recorded.place.used, recorded);
            }
            Err(fault) => cache.graphs.fault = Some(fault),
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
