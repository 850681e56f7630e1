//! Sharding of a whole model's parameters over ranks (ZeRO stage 3): those that an optimiser trains, and the rest.

use std::rc::Rc;

use tch::Tensor;
use unveil_model::Vlm;

use crate::error::{Result, TrainerError};
use crate::optim::AdamW;
use crate::shard::{PassHooks, Ranks, ShardLayout, ShardedParameters, ZeroStage, layer_of};

/// Reads some parameters by name.
pub type ParameterReader<'a, E> = dyn FnMut(&[(String, Tensor)]) -> Result<(), E> + 'a;

/// A layout of parameters, and the values that this rank owns of them.
type OwnedShard = (Rc<ShardLayout>, Tensor);

/// Shards the parameters of `vlm`, which `optimizer` trains, and releases them; returns `None` if the ZeRO stage does not ask for it. All
/// weights must be gathered.
///
/// # Errors
/// Returns [`crate::TrainerError::Extension`] if the memory of a parameter cannot be released.
pub(crate) fn shard_trained(vlm: &Vlm, optimizer: &AdamW, ranks: &Rc<Ranks>) -> Result<Option<Rc<ShardedParameters>>> {
    let master = optimizer.master_shard();
    let Some((layout, master)) = master.filter(|_| ranks.zero_stage() == ZeroStage::Parameters) else {
        return Ok(None);
    };
    let frozen = untrained_shard(vlm, Some(&layout), ranks)?;
    let sources = std::iter::once((layout, master)).chain(frozen).collect();
    let sharded = ShardedParameters::new(ranks.clone(), sources)?;
    sharded.release_all()?;
    Ok(Some(Rc::new(sharded)))
}

/// Shards the parameters of `vlm`, which is not trained, and releases them; returns the hooks of its passes.
///
/// # Errors
/// Returns [`crate::TrainerError::Extension`] if the memory of a parameter cannot be released.
pub(crate) fn shard_untrained(vlm: &Vlm, ranks: &Rc<Ranks>) -> Result<PassHooks> {
    let sources = untrained_shard(vlm, None, ranks)?.into_iter().collect();
    let sharded = ShardedParameters::new(ranks.clone(), sources)?;
    sharded.release_all()?;
    Ok(PassHooks { sharded: Some(Rc::new(sharded)), by_layer: true, ..PassHooks::default() })
}

/// Passes the parameters of `vlm` and of its adapters to `read` on rank 0, in parts that are gathered one after another if they are sharded;
/// all ranks call it.
///
/// # Errors
/// Returns the error of `read`, and [`TrainerError::Ranks`] if another rank has failed or timed out.
pub(crate) fn visit_parameters<E: From<TrainerError>>(
    vlm: &Vlm,
    (sharded, ranks): (Option<&ShardedParameters>, &Ranks),
    read: &mut ParameterReader<'_, E>,
) -> Result<(), E> {
    let mut read_matching = |is_read: &dyn Fn(&str) -> bool| {
        if ranks.rank() > 0 {
            return Ok(());
        }
        let adapters = vlm.adapters().into_iter().flat_map(|a| a.named_parameters());
        let named = vlm.named_parameters().iter().chain(adapters).filter(|(name, _)| is_read(name));
        read(&named.map(|(name, t)| (name.clone(), t.shallow_clone())).collect::<Vec<_>>())
    };
    match sharded {
        Some(sharded) => sharded.visit_parts(|part| read_matching(&|name: &str| layer_of(name) == part)),
        None => read_matching(&|_: &str| true),
    }
}

/// Returns the layout of the parameters of `vlm` that are not `trained`, with the values that this rank owns; `None` if there are none.
fn untrained_shard(vlm: &Vlm, trained: Option<&ShardLayout>, ranks: &Ranks) -> Result<Option<OwnedShard>> {
    let is_untrained = |name: &str| trained.is_none_or(|t| t.slots().all(|s| s.name != *name));
    let named = vlm.named_parameters().iter().filter(|(n, _)| is_untrained(n));
    let named: Vec<_> = named.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    if named.is_empty() {
        return Ok(None);
    }
    let layout = ShardLayout::new(&named, true, ranks.shard())?;
    let owned = layout.owned_values(vlm.kind(), |s| Ok(s.tensor.shallow_clone()))?;
    Ok(Some((Rc::new(layout), owned)))
}
