//! Hooks of one pass through a model with sharded state: they gather parameters before a layer runs and reduce its gradients after.
//! The collective calls come in the same order on all ranks, whether or not a rank has anything to compute.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use unveil_model::{Direction, LayerHook};

use super::gradients::GradientReducer;
use super::sharded_parameters::ShardedParameters;
use crate::error::{Result, TrainerError};

/// Layers whose parameters are gathered ahead of the one that is computed: their calls overlap with it.
const PREFETCHED_LAYERS: usize = 2;

/// Hooks that gather parameters before a layer runs and reduce its gradients after.
#[derive(Clone, Default, Debug)]
pub(crate) struct PassHooks {
    /// Parameters to gather; `None` where they are not sharded.
    pub sharded: Option<Rc<ShardedParameters>>,
    /// Reducer of gradients; `None` for a model that is not trained.
    pub gradients: Option<Rc<RefCell<GradientReducer>>>,
    /// Whether the hooks run around each layer; if not, all gradients are collected at the end of the pass.
    pub by_layer: bool,
}

/// One forward pass under way, with its backward pass if there is one.
pub(crate) struct HookedPass {
    hooks: PassHooks,
    /// Next layer that the forward pass will run.
    next_forward: Cell<usize>,
    /// One above the next layer that the backward pass will run.
    next_backward: Cell<usize>,
    /// Whether this is the last pass of its mini-batch.
    last: Cell<bool>,
    /// The first error of the hooks.
    error: RefCell<Option<TrainerError>>,
}

impl PassHooks {
    fn layers(&self) -> usize {
        let with_gradients = self.gradients.as_ref().map_or(0, |g| g.borrow().layers());
        self.sharded.as_ref().map_or(0, |s| s.layers).max(with_gradients)
    }

    /// Begins a pass. All ranks call it together.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn begin(&self) -> Result<Rc<HookedPass>> {
        if let Some(sharded) = &self.sharded {
            sharded.prefetch(Some(0))?;
            sharded.gather(None)?;
        }
        Ok(Rc::new(HookedPass {
            hooks: self.clone(),
            next_forward: Cell::new(0),
            next_backward: Cell::new(self.layers()),
            last: Cell::new(false),
            error: RefCell::new(None),
        }))
    }
}

impl HookedPass {
    /// Returns the hook to set on the tape; `None` where nothing is to be done layer by layer.
    pub(crate) fn layer_hook(self: &Rc<Self>) -> Option<Rc<dyn LayerHook>> {
        self.hooks.by_layer.then(|| self.clone() as Rc<dyn LayerHook>)
    }

    /// Ends the forward pass, including that of a rank that had nothing to compute.
    ///
    /// # Errors
    /// Returns the first error of the hooks.
    pub(crate) fn end_forward(&self) -> Result<()> {
        self.run_skipped_layers(Direction::Forward, self.hooks.layers());
        self.keep_error(self.check_gathers());
        self.error.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Begins the backward pass; `last` marks the last pass of the mini-batch.
    pub(crate) fn begin_backward(&self, last: bool) {
        self.last.set(last);
    }

    /// Ends the backward pass, including that of a rank that had nothing to compute.
    ///
    /// # Errors
    /// Returns the first error of the hooks.
    pub(crate) fn end_backward(&self) -> Result<()> {
        self.run_skipped_layers(Direction::Backward, 0);
        self.keep_error(self.accumulate(None));
        self.keep_error(self.check_gathers());
        self.error.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Runs the hooks of the layers up to `to` that the pass itself did not visit.
    fn run_skipped_layers(&self, direction: Direction, to: usize) {
        let next = || match direction {
            Direction::Forward => (self.next_forward.get() < to).then(|| self.next_forward.get()),
            Direction::Backward => (self.next_backward.get() > to).then(|| self.next_backward.get() - 1),
        };
        while let Some(layer) = next() {
            self.keep_error(self.gather(layer, direction));
            self.keep_error(self.release(layer, direction));
        }
    }

    /// Gathers the parameters of `layer`, and starts to gather those of the layers after it.
    fn gather(&self, layer: usize, direction: Direction) -> Result<()> {
        let Some(sharded) = &self.hooks.sharded else { return Ok(()) };
        sharded.prefetch(Some(layer))?;
        for next in layers_after(layer, direction, sharded.layers) {
            sharded.prefetch(Some(next))?;
        }
        sharded.gather(Some(layer))
    }

    /// Waits for the gathers whose parameters were computed with.
    fn check_gathers(&self) -> Result<()> {
        self.hooks.sharded.as_ref().map_or(Ok(()), |sharded| sharded.check_gathers())
    }

    /// Releases the parameters of `layer`; a backward pass also accumulates its gradients.
    fn release(&self, layer: usize, direction: Direction) -> Result<()> {
        match direction {
            Direction::Forward => self.next_forward.set(layer + 1),
            Direction::Backward => self.next_backward.set(layer),
        }
        if let Some(sharded) = &self.hooks.sharded {
            sharded.release(Some(layer))?;
        }
        if direction == Direction::Backward { self.accumulate(Some(layer)) } else { Ok(()) }
    }

    fn accumulate(&self, layer: Option<usize>) -> Result<()> {
        let Some(gradients) = &self.hooks.gradients else { return Ok(()) };
        gradients.borrow_mut().accumulate(layer, self.last.get())
    }

    /// Keeps the first error; the pass continues, because the tape cannot be stopped in the middle.
    fn keep_error(&self, result: Result<()>) {
        if let Err(e) = result {
            self.error.borrow_mut().get_or_insert(e);
        }
    }
}

/// Returns the layers of which the parameters are gathered ahead while `layer` of `layers` is computed.
fn layers_after(layer: usize, direction: Direction, layers: usize) -> impl Iterator<Item = usize> {
    (1..=PREFETCHED_LAYERS).filter_map(move |k| match direction {
        Direction::Forward => Some(layer + k).filter(|next| *next < layers),
        Direction::Backward => layer.checked_sub(k),
    })
}

impl LayerHook for HookedPass {
    fn before(&self, layer: usize, direction: Direction) {
        let visited = if direction == Direction::Forward { layer } else { layer + 1 };
        self.run_skipped_layers(direction, visited);
        self.keep_error(self.gather(layer, direction));
    }

    fn after(&self, layer: usize, direction: Direction) {
        self.keep_error(self.release(layer, direction));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_layers_are_gathered_ahead_within_the_model() {
        let after = |layer, direction| layers_after(layer, direction, 4).collect::<Vec<_>>();
        assert_eq!([after(0, Direction::Forward), after(2, Direction::Forward)], [vec![1, 2], vec![3]]);
        assert_eq!([after(3, Direction::Backward), after(1, Direction::Backward)], [vec![2, 1], vec![0]]);
        assert!(after(3, Direction::Forward).is_empty() && after(0, Direction::Backward).is_empty());
    }
}
