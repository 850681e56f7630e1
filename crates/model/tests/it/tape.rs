//! Backward passes in segments, and the hooks around layers.

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, Prompt};
use unveil_model::{Direction, LayerHook, PackedBatch, PackedGroup, Tape, TapeMode, Var};
use unveil_torch_ext::count_operations;

use crate::common::fresh;

/// Segments with several inputs and outputs, shared values, one without parameters and one whose output is unused.
#[test]
fn segments_equal_one_graph() {
    tch::manual_seed(2);
    let r = |n: &[i64]| Tensor::randn(n, (Kind::Double, Device::Cpu));
    let w = r(&[4, 4]);
    let u = r(&[4, 4]);
    let idle = r(&[4]);
    let x = r(&[3, 4]);
    let run = |mode: TapeMode| {
        for t in [&w, &u, &idle] {
            let mut t = t.set_requires_grad(true);
            t.zero_grad();
        }
        let mut tape = Tape::new(mode);
        let start = Var::constant(x.shallow_clone());
        let frozen = tape.call1(&[&start], |t| t[0].tanh());
        let mut both = tape.call(&[&frozen], |t| vec![t[0].matmul(&w), t[0].matmul(&u).sin()]);
        let b = both.remove(1);
        let a = both.remove(0);
        let _unused = tape.call1(&[&a], |t| &t[0] * &idle);
        let joined = tape.call1(&[&a, &b], |t| t[0].matmul(&u) * &t[1]);
        let combined = tape.call1(&[&joined, &a], |t| t[0].exp() + t[1].square());
        let first_leaf = tape.leaf(&combined);
        let second_leaf = tape.leaf(&b);
        let loss = first_leaf.square().sum(Kind::Double) + (second_leaf * 3.0).sum(Kind::Double);
        loss.backward();
        tape.backward().expect("backward pass");
        (loss.double_value(&[]), w.grad().copy(), u.grad().copy())
    };
    let (loss, gw, gu) = run(TapeMode::Graph);
    for mode in [TapeMode::Segments, TapeMode::Recompute] {
        let (l, a, b) = run(mode);
        assert_eq!(l, loss);
        for (gradient, expected) in [(a, &gw), (b, &gu)] {
            assert!(
                (gradient - expected).abs().max().double_value(&[]) < 1e-10 * expected.abs().max().double_value(&[])
            );
        }
    }
}

/// The vector-Jacobian product of a segment starts from the gradients of its outputs; a scalar product with them would be computed and
/// differentiated only for its gradient.
#[test]
fn backward_pass_computes_no_scalar_products() {
    let r = |n: &[i64]| Tensor::randn(n, (Kind::Float, Device::Cpu));
    let w = r(&[4, 4]).set_requires_grad(true);
    for mode in [TapeMode::Segments, TapeMode::Recompute] {
        let mut tape = Tape::new(mode);
        let start = Var::constant(r(&[3, 4]));
        let once = tape.call1(&[&start], |t| t[0].mm(&w));
        let twice = tape.call1(&[&once], |t| t[0].mm(&w));
        tape.leaf(&twice).sum(Kind::Float).backward();
        let (passed, counts) = count_operations(|| tape.backward()).expect("counts");
        passed.expect("backward pass");
        let recomputed = if mode == TapeMode::Recompute { 2 } else { 0 };
        assert_eq!(counts["aten::mm"], 3 + recomputed, "{counts:?}");
        for product in ["aten::mul", "aten::sum"] {
            assert_eq!(counts.get(product), None, "{mode:?}: {product}");
        }
    }
}

/// Records the layer of each call, its direction, and whether it came before the layer.
#[derive(Default)]
struct HookLog(RefCell<Vec<(usize, Direction, bool)>>);

impl LayerHook for HookLog {
    fn before(&self, layer: usize, direction: Direction) {
        self.0.borrow_mut().push((layer, direction, true));
    }

    fn after(&self, layer: usize, direction: Direction) {
        self.0.borrow_mut().push((layer, direction, false));
    }
}

#[test]
fn hooks_are_called_around_layers_in_both_directions() {
    let vlm = &fresh(Family::Qwen2_5Vl, 1);
    vlm.set_trainable(|_| true);
    let prompt = Prompt { tokens: vec![10, 11, 12], grids: Vec::new() };
    let group = PackedGroup { prompt, responses: vec![vec![13, 14]] };
    let batch = PackedBatch::build(&[group], vlm.config(), Device::Cpu).expect("packs");
    let layers = vlm.config().text.num_hidden_layers;
    let around = |layer: usize| [(layer, true), (layer, false)];
    for mode in [TapeMode::Segments, TapeMode::Recompute] {
        let log = Rc::new(HookLog::default());
        let mut tape = Tape::new(mode);
        tape.set_layer_hook(Some(log.clone()));
        let (hidden, _) = vlm.train_packed(&mut tape, &batch, None, None).expect("runs");
        tape.leaf(&hidden).sum(Kind::Float).backward();
        tape.backward().expect("backward pass");
        let calls = |direction| {
            let all = log.0.borrow();
            all.iter().filter(|(_, d, _)| *d == direction).map(|(l, _, e)| (*l, *e)).collect::<Vec<_>>()
        };
        assert_eq!(calls(Direction::Forward), (0..layers).flat_map(around).collect::<Vec<_>>());
        assert_eq!(calls(Direction::Backward), (0..layers).rev().flat_map(around).collect::<Vec<_>>());
    }
}
