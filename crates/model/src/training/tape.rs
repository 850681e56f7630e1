//! Gradient checkpointing: a forward pass in segments, whose backward pass runs segment by segment in reverse, each a vector-Jacobian
//! product. The activations inside a segment may be dropped and recomputed. Gradients of parameters accumulate in their tensors, as in a
//! plain backward pass.

use std::rc::Rc;

use tch::Tensor;

use crate::Result;

/// Treatment of the activations of a segment until its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapeMode {
    /// Activations are kept in one autograd graph without segments (no graph if gradients are off). [`Tape::backward`] does nothing.
    Graph,
    /// Activations are kept in a separate graph for each segment, so that the backward pass can call hooks.
    Segments,
    /// Activations are recomputed; only the inputs of segments are kept (arXiv 1604.06174).
    Recompute,
}

/// Direction of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the first layer to the last.
    Forward,
    /// From the last layer to the first.
    Backward,
}

/// A hook around each decoder layer: gathers parameters before they are needed, and reduces gradients when they are complete. A backward
/// pass skips layers that need no gradient.
pub trait LayerHook {
    /// Called before `layer` is computed, differentiated, or both.
    fn before(&self, layer: usize, direction: Direction);

    /// Called after it. In a backward pass the gradients of its parameters are complete then, as far as this pass contributes to them.
    fn after(&self, layer: usize, direction: Direction);
}

/// A tensor on a tape.
#[derive(Debug)]
pub struct Var {
    /// Its value, detached.
    pub tensor: Tensor,
    /// Index of its gradient; `None` if it needs none.
    id: Option<usize>,
}

impl Var {
    /// Creates a value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, id: None }
    }
}

type SegmentFn<'a> = Box<dyn Fn(&[Tensor]) -> Vec<Tensor> + 'a>;

/// How the outputs of a segment are recovered for its backward pass.
enum Recovery<'a> {
    /// By running the segment again.
    Recompute(SegmentFn<'a>),
    /// Leaves and outputs were kept, with the graph between them.
    Kept(Vec<Tensor>, Vec<Tensor>),
}

struct Segment<'a> {
    recovery: Recovery<'a>,
    /// Decoder layer of the segment and its hook, if it has one.
    hook: Option<(usize, Rc<dyn LayerHook + 'a>)>,
    inputs: Vec<Var>,
    /// Indices of the gradients of the outputs.
    outputs: Vec<Option<usize>>,
}

/// The segments of one pass.
pub struct Tape<'a> {
    mode: TapeMode,
    hook: Option<Rc<dyn LayerHook + 'a>>,
    segments: Vec<Segment<'a>>,
    gradients: Vec<Option<Tensor>>,
    /// Values that a loss was computed from, with the indices of their gradients.
    leaves: Vec<(usize, Tensor)>,
}

impl std::fmt::Debug for Tape<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape").field("mode", &self.mode).field("segments", &self.segments.len()).finish_non_exhaustive()
    }
}

impl<'a> Tape<'a> {
    /// Creates an empty tape. Passes on it must run with gradients enabled, unless the mode is [`TapeMode::Graph`].
    pub fn new(mode: TapeMode) -> Self {
        Self { mode, hook: None, segments: Vec::new(), gradients: Vec::new(), leaves: Vec::new() }
    }

    /// Sets the hook that is called around every layer recorded from now on.
    pub fn set_layer_hook(&mut self, hook: Option<Rc<dyn LayerHook + 'a>>) {
        self.hook = hook;
    }

    /// Runs one segment. `run` must return the same values whenever it is called.
    pub fn call(&mut self, inputs: &[&Var], run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a) -> Vec<Var> {
        self.record(None, inputs, run)
    }

    /// [`Tape::call`] with one output.
    pub fn call1(&mut self, inputs: &[&Var], run: impl Fn(&[Tensor]) -> Tensor + 'a) -> Var {
        self.call(inputs, move |t| vec![run(t)]).remove(0)
    }

    /// [`Tape::call`] for a decoder layer, with the hook around it.
    pub(crate) fn call_layer(
        &mut self,
        layer: usize,
        inputs: &[&Var],
        run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a,
    ) -> Vec<Var> {
        let Some(hook) = self.hook.clone() else { return self.record(None, inputs, run) };
        hook.before(layer, Direction::Forward);
        let out = self.record(Some((layer, hook.clone())), inputs, run);
        hook.after(layer, Direction::Forward);
        out
    }

    fn record(
        &mut self,
        hook: Option<(usize, Rc<dyn LayerHook + 'a>)>,
        inputs: &[&Var],
        run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a,
    ) -> Vec<Var> {
        if self.mode == TapeMode::Graph {
            let tensors: Vec<Tensor> = inputs.iter().map(|v| v.tensor.shallow_clone()).collect();
            return run(&tensors).into_iter().map(Var::constant).collect();
        }
        let leaves = detached_leaves(inputs.iter().copied());
        let computed = run(&leaves);
        let outputs: Vec<Var> = computed
            .iter()
            .map(|t| {
                let id = t.requires_grad().then(|| {
                    self.gradients.push(None);
                    self.gradients.len() - 1
                });
                Var { tensor: t.detach(), id }
            })
            .collect();
        let ids: Vec<Option<usize>> = outputs.iter().map(|v| v.id).collect();
        if ids.iter().any(Option::is_some) {
            let inputs = inputs.iter().map(|v| Var { tensor: v.tensor.shallow_clone(), id: v.id }).collect();
            let recovery = match self.mode {
                TapeMode::Segments => Recovery::Kept(leaves, computed),
                _ => Recovery::Recompute(Box::new(run)),
            };
            self.segments.push(Segment { recovery, hook, inputs, outputs: ids });
        }
        outputs
    }

    /// Returns a value to compute a loss from. Run the backward pass of the loss before [`Tape::backward`].
    pub fn leaf(&mut self, var: &Var) -> Tensor {
        let Some(id) = var.id else { return var.tensor.shallow_clone() };
        let leaf = var.tensor.detach().set_requires_grad(true);
        self.leaves.push((id, leaf.shallow_clone()));
        leaf
    }

    /// Propagates the gradients at the leaves back through all segments to the parameters.
    ///
    /// # Errors
    /// Returns [`ModelError::Ext`](crate::ModelError::Ext) if libtorch refuses an operation.
    pub fn backward(mut self) -> Result<()> {
        for (id, leaf) in std::mem::take(&mut self.leaves) {
            accumulate(&mut self.gradients[id], leaf.grad());
        }
        while let Some(segment) = self.segments.pop() {
            let seeds: Vec<Option<Tensor>> =
                segment.outputs.iter().map(|id| id.and_then(|id| self.gradients[id].take())).collect();
            if seeds.iter().all(Option::is_none) {
                continue;
            }
            if let Some((layer, hook)) = &segment.hook {
                hook.before(*layer, Direction::Backward);
            }
            let (leaves, outputs) = match segment.recovery {
                Recovery::Kept(leaves, outputs) => (leaves, outputs),
                Recovery::Recompute(run) => {
                    let leaves = detached_leaves(segment.inputs.iter());
                    let outputs = run(&leaves);
                    (leaves, outputs)
                }
            };
            let seeded: Vec<(&Tensor, &Tensor)> =
                outputs.iter().zip(&seeds).filter_map(|(t, seed)| Some((t, seed.as_ref()?))).collect();
            unveil_torch_ext::backward(&seeded)?;
            for (input, leaf) in segment.inputs.iter().zip(&leaves) {
                if let Some(id) = input.id {
                    accumulate(&mut self.gradients[id], leaf.grad());
                }
            }
            if let Some((layer, hook)) = &segment.hook {
                hook.after(*layer, Direction::Backward);
            }
        }
        Ok(())
    }
}

/// Returns the values as leaves that collect the gradients of a segment.
fn detached_leaves<'v>(vars: impl Iterator<Item = &'v Var>) -> Vec<Tensor> {
    vars.map(|v| {
        let leaf = v.tensor.detach();
        if v.id.is_some() { leaf.set_requires_grad(true) } else { leaf }
    })
    .collect()
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) {
    if gradient.defined() {
        *sum = Some(match sum.take() {
            None => gradient,
            Some(before) => before + gradient,
        });
    }
}
