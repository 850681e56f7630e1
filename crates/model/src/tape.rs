//! A pass in segments, and its backward pass segment by segment, last first: each is a vector-Jacobian product. What a segment
//! computed inside is thrown away in between and computed again. Gradients of parameters add up in their tensors, as in a plain
//! backward pass. Knows no model.

use std::rc::Rc;

use tch::Tensor;

/// What becomes of a segment's activations until its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They stay: there are no segments but one graph, or none where gradients are off. [`Tape::backward`] has nothing left to do.
    Graph,
    /// They stay, each segment's in a graph of its own, so that a backward pass can be escorted.
    Segments,
    /// They are computed again; only what goes from segment to segment stays (arXiv 1604.06174).
    Recompute,
}

/// Where a pass goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the first layer to the last.
    Forward,
    /// From the last layer to the first.
    Backward,
}

/// Goes along with a pass through the decoder's layers: brings parameters before they are needed, takes gradients when they are
/// whole. A layer that a backward pass has no need of is not visited.
pub trait Escort {
    /// Before `layer` is computed, differentiated, or both.
    fn enter(&self, layer: usize, way: Way);

    /// After it. On the way back the gradients of its parameters hold all that this pass adds.
    fn leave(&self, layer: usize, way: Way);
}

/// A tensor on a tape.
pub struct Var {
    /// Its value.
    pub tensor: Tensor,
    /// Where its gradient is gathered; none where it needs none.
    id: Option<usize>,
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, id: None }
    }
}

type Run<'a> = Box<dyn Fn(&[Tensor]) -> Vec<Tensor> + 'a>;

/// How a segment's outputs are had again for its backward pass.
enum Source<'a> {
    /// By running it again.
    Again(Run<'a>),
    /// They are kept with their graph, and the leaves that it begins at.
    Kept(Vec<Tensor>, Vec<Tensor>),
}

struct Segment<'a> {
    source: Source<'a>,
    /// The decoder layer that it is, and who goes along with it.
    escort: Option<(usize, Rc<dyn Escort + 'a>)>,
    /// Inputs, and where their gradients go.
    inputs: Vec<Var>,
    outputs: Vec<Option<usize>>,
}

/// The segments of one pass.
pub struct Tape<'a> {
    mode: Mode,
    escort: Option<Rc<dyn Escort + 'a>>,
    segments: Vec<Segment<'a>>,
    gradients: Vec<Option<Tensor>>,
    /// What a loss was computed from, and where the gradients go that it left there.
    leaves: Vec<(usize, Tensor)>,
}

impl<'a> Tape<'a> {
    /// An empty tape. Run passes on it with gradients on, unless the mode is [`Mode::Graph`].
    pub fn new(mode: Mode) -> Self {
        Self { mode, escort: None, segments: Vec::new(), gradients: Vec::new(), leaves: Vec::new() }
    }

    /// Who goes along with what is put on the tape from here on, there and back.
    pub fn escort(&mut self, escort: Option<Rc<dyn Escort + 'a>>) {
        self.escort = escort;
    }

    /// Runs one segment. `run` must give the same again when it is called again.
    pub fn call(&mut self, inputs: &[&Var], run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a) -> Vec<Var> {
        self.segment(None, inputs, run)
    }

    /// [`Tape::call`] with one output.
    pub fn call1(&mut self, inputs: &[&Var], run: impl Fn(&[Tensor]) -> Tensor + 'a) -> Var {
        self.call(inputs, move |t| vec![run(t)]).remove(0)
    }

    /// [`Tape::call`] for a layer of the decoder, which is escorted.
    pub(crate) fn call_layer(
        &mut self,
        layer: usize,
        inputs: &[&Var],
        run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a,
    ) -> Vec<Var> {
        let Some(escort) = self.escort.clone() else { return self.segment(None, inputs, run) };
        escort.enter(layer, Way::Forward);
        let out = self.segment(Some((layer, escort.clone())), inputs, run);
        escort.leave(layer, Way::Forward);
        out
    }

    fn segment(
        &mut self,
        escort: Option<(usize, Rc<dyn Escort + 'a>)>,
        inputs: &[&Var],
        run: impl Fn(&[Tensor]) -> Vec<Tensor> + 'a,
    ) -> Vec<Var> {
        if self.mode == Mode::Graph {
            let plain: Vec<Tensor> = inputs.iter().map(|v| v.tensor.shallow_clone()).collect();
            return run(&plain).into_iter().map(Var::constant).collect();
        }
        let leaves = as_leaves(inputs.iter().copied());
        let made = run(&leaves);
        let outputs: Vec<Var> = made
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
            let source = match self.mode {
                Mode::Segments => Source::Kept(leaves, made),
                _ => Source::Again(Box::new(run)),
            };
            self.segments.push(Segment { source, escort, inputs, outputs: ids });
        }
        outputs
    }

    /// A value to compute a loss from; the loss's own backward pass comes before [`Tape::backward`].
    pub fn leaf(&mut self, var: &Var) -> Tensor {
        let Some(id) = var.id else { return var.tensor.shallow_clone() };
        let leaf = var.tensor.detach().set_requires_grad(true);
        self.leaves.push((id, leaf.shallow_clone()));
        leaf
    }

    /// Takes the gradients at the leaves through all segments to the parameters.
    pub fn backward(mut self) {
        for (id, leaf) in std::mem::take(&mut self.leaves) {
            add(&mut self.gradients[id], leaf.grad());
        }
        while let Some(segment) = self.segments.pop() {
            let seeds: Vec<Option<Tensor>> =
                segment.outputs.iter().map(|id| id.and_then(|id| self.gradients[id].take())).collect();
            if seeds.iter().all(Option::is_none) {
                continue;
            }
            if let Some((layer, escort)) = &segment.escort {
                escort.enter(*layer, Way::Backward);
            }
            let (leaves, made) = match segment.source {
                Source::Kept(leaves, made) => (leaves, made),
                Source::Again(run) => {
                    let leaves = as_leaves(segment.inputs.iter());
                    let made = run(&leaves);
                    (leaves, made)
                }
            };
            // The gradient of sum(output * seed) is the vector-Jacobian product.
            let products = made.iter().zip(&seeds).filter_map(|(t, seed)| Some((t * seed.as_ref()?).sum(t.kind())));
            if let Some(total) = products.reduce(|a, b| a + b) {
                total.backward();
            }
            for (input, leaf) in segment.inputs.iter().zip(&leaves) {
                if let Some(id) = input.id {
                    add(&mut self.gradients[id], leaf.grad());
                }
            }
            if let Some((layer, escort)) = &segment.escort {
                escort.leave(*layer, Way::Backward);
            }
        }
    }
}

fn as_leaves<'v>(vars: impl Iterator<Item = &'v Var>) -> Vec<Tensor> {
    vars.map(|v| {
        let plain = v.tensor.detach();
        if v.id.is_some() { plain.set_requires_grad(true) } else { plain }
    })
    .collect()
}

fn add(sum: &mut Option<Tensor>, gradient: Tensor) {
    if gradient.defined() {
        *sum = Some(match sum.take() {
            None => gradient,
            Some(before) => before + gradient,
        });
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// Segments with several inputs and outputs, shared values, a part without parameters and one nobody asks for.
    #[test]
    fn segments_equal_one_graph() {
        tch::manual_seed(2);
        let r = |n: &[i64]| Tensor::randn(n, (Kind::Double, tch::Device::Cpu));
        let (w, u, idle) = (r(&[4, 4]), r(&[4, 4]), r(&[4]));
        let x = r(&[3, 4]);
        let run = |mode: Mode| {
            for t in [&w, &u, &idle] {
                let mut t = t.set_requires_grad(true);
                t.zero_grad();
            }
            let mut tape = Tape::new(mode);
            let start = Var::constant(x.shallow_clone());
            let frozen = tape.call1(&[&start], |t| t[0].tanh());
            let mut both = tape.call(&[&frozen], |t| vec![t[0].matmul(&w), t[0].matmul(&u).sin()]);
            let (b, a) = (both.remove(1), both.remove(0));
            let _unused = tape.call1(&[&a], |t| &t[0] * &idle);
            let joined = tape.call1(&[&a, &b], |t| t[0].matmul(&u) * &t[1]);
            let again = tape.call1(&[&joined, &a], |t| t[0].exp() + t[1].square());
            let (one, two) = (tape.leaf(&again), tape.leaf(&b));
            let loss = one.square().sum(Kind::Double) + (two * 3.0).sum(Kind::Double);
            loss.backward();
            tape.backward();
            (loss.double_value(&[]), w.grad().copy(), u.grad().copy())
        };
        let (loss, gw, gu) = run(Mode::Graph);
        for mode in [Mode::Segments, Mode::Recompute] {
            let (l, a, b) = run(mode);
            assert_eq!(l, loss);
            for (found, wanted) in [(a, &gw), (b, &gu)] {
                assert!((found - wanted).abs().max().double_value(&[]) < 1e-10 * wanted.abs().max().double_value(&[]));
            }
        }
    }

    #[derive(Default)]
    struct Walk(std::cell::RefCell<Vec<(usize, Way, bool)>>);

    impl Escort for Walk {
        fn enter(&self, layer: usize, way: Way) {
            self.0.borrow_mut().push((layer, way, true));
        }

        fn leave(&self, layer: usize, way: Way) {
            self.0.borrow_mut().push((layer, way, false));
        }
    }

    #[test]
    fn layers_are_escorted_there_and_back() {
        let w = Tensor::ones([2], (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
        for mode in [Mode::Segments, Mode::Recompute] {
            let walk = Rc::new(Walk::default());
            let mut tape = Tape::new(mode);
            tape.escort(Some(walk.clone()));
            let mut x = Var::constant(w.detach());
            for layer in 0..2 {
                x = tape.call_layer(layer, &[&x], |t| vec![&t[0] * &w]).remove(0);
            }
            tape.leaf(&x).sum(Kind::Double).backward();
            tape.backward();
            let walked = |way| {
                let all = walk.0.borrow();
                all.iter().filter(|(_, w, _)| *w == way).map(|(l, _, e)| (*l, *e)).collect::<Vec<_>>()
            };
            assert_eq!(walked(Way::Forward), [(0, true), (0, false), (1, true), (1, false)]);
            assert_eq!(walked(Way::Backward), [(1, true), (1, false), (0, true), (0, false)]);
        }
    }
}
