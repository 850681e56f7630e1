//! AdamW over one flat buffer, global-norm clipping, learning-rate schedule. State is keyed by parameter name.
//!
//! Must not know: what the gradients are of. All gradients are gathered into one flat tensor, so that an update is about a
//! dozen large operations rather than ten small ones per parameter.

use tch::{Kind, Tensor, no_grad};
use unveil_config::schema::Optimizer;

use crate::error::{LearnerError, Result};

/// Learning rate of update number `step` (from 0) of `total`: linear warm-up, constant, then linear from `lr` to
/// `lr * lr_end` over the last `decay` share of the updates.
pub fn lr_at(o: &Optimizer, step: u64, total: u64) -> f64 {
    let falling = (o.decay * total as f64).max(1.0);
    let fallen = ((step + 1) as f64 - (total as f64 - falling)).clamp(0.0, falling) / falling;
    let rise = ((step + 1) as f64 / o.warmup.max(1) as f64).min(1.0);
    let fall = if o.decay > 0.0 { 1.0 - fallen * (1.0 - o.lr_end) } else { 1.0 };
    o.lr * rise.min(fall)
}

/// One parameter's place in the flat buffers.
struct Slot {
    name: String,
    tensor: Tensor,
    shape: Vec<i64>,
    begin: i64,
    count: i64,
}

/// All gradients, flat, with their global L2 norm.
pub struct Gradient {
    flat: Tensor,
    /// Norm before clipping; not finite when any gradient is not.
    pub norm: f64,
}

/// AdamW (arXiv 1711.05101, algorithm 2): decoupled decay of matrices only (2 dimensions or more), bias-corrected moments in
/// fp32. Same update as `torch.optim.AdamW` up to rounding.
pub struct AdamW {
    options: Optimizer,
    slots: Vec<Slot>,
    first: Tensor,
    second: Tensor,
    updates: u64,
}

impl AdamW {
    /// An optimiser for leaf parameters, moments at 0, in their kind.
    ///
    /// # Errors
    /// No parameter, a parameter twice, or one that is not fp32.
    pub fn new(options: &Optimizer, parameters: &[(String, Tensor)]) -> Result<Self> {
        let Some((_, any)) = parameters.first() else {
            return Err(LearnerError::Setting("nothing is trained: every parameter is frozen".into()));
        };
        let mut begin = 0;
        let mut slots: Vec<Slot> = Vec::with_capacity(parameters.len());
        for (name, tensor) in parameters {
            let kind = tensor.kind();
            if kind != any.kind() || !matches!(kind, Kind::Float | Kind::Double) {
                return Err(LearnerError::Setting(format!(
                    "parameter `{name}` is {kind:?}: training needs fp32 weights, or all in fp64"
                )));
            }
            if slots.iter().any(|s| s.name == *name) {
                return Err(LearnerError::Setting(format!("parameter `{name}` is given twice")));
            }
            let count = tensor.numel() as i64;
            slots.push(Slot { name: name.clone(), tensor: tensor.shallow_clone(), shape: tensor.size(), begin, count });
            begin += count;
        }
        let zeros = || Tensor::zeros([begin], (any.kind(), any.device()));
        Ok(Self { options: options.clone(), first: zeros(), second: zeros(), slots, updates: 0 })
    }

    /// Number of scalars that are trained.
    pub fn numel(&self) -> i64 {
        self.first.size()[0]
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Forgets the gradients of the last backward pass.
    pub fn zero_grad(&mut self) {
        for slot in &mut self.slots {
            slot.tensor.zero_grad();
        }
    }

    /// Gathers the gradients; a parameter that the loss did not touch counts 0.
    pub fn gradient(&self) -> Result<Gradient> {
        no_grad(|| {
            let parts: Vec<Tensor> = self
                .slots
                .iter()
                .map(|s| {
                    let g = s.tensor.grad();
                    if g.defined() {
                        g.reshape([-1])
                    } else {
                        Tensor::zeros([s.count], (s.tensor.kind(), s.tensor.device()))
                    }
                })
                .collect();
            let flat = Tensor::f_cat(&parts, 0)?;
            let norm = flat.f_norm()?.f_double_value(&[])?;
            Ok(Gradient { flat, norm })
        })
    }

    /// Copies of a gradient's parts in the parameters' shapes, by name.
    pub fn by_name(&self, gradient: &Gradient) -> Result<Vec<(String, Tensor)>> {
        let part = |s: &Slot| -> Result<_> {
            Ok((s.name.clone(), gradient.flat.f_narrow(0, s.begin, s.count)?.f_view(s.shape.as_slice())?.copy()))
        };
        self.slots.iter().map(part).collect()
    }

    /// Clips by global norm as `torch.nn.utils.clip_grad_norm_` does, then applies one update at learning rate `lr`.
    pub fn step(&mut self, mut gradient: Gradient, lr: f64) -> Result<()> {
        let o = &self.options;
        let [b1, b2] = o.betas;
        self.updates += 1;
        let t = self.updates as f64;
        let (c1, c2) = (1.0 - b1.powf(t), (1.0 - b2.powf(t)).sqrt());
        no_grad(|| {
            let g = &mut gradient.flat;
            if o.clip_norm > 0.0 && gradient.norm > o.clip_norm {
                let _ = g.g_mul_scalar_(o.clip_norm / (gradient.norm + 1e-6));
            }
            let _ = self.first.f_lerp_(g, 1.0 - b1)?;
            let _ = g.square_();
            let _ = self.second.f_lerp_(g, 1.0 - b2)?;
            // m / c1 / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + eps c2): fewer passes over memory.
            let mut denominator = self.second.f_sqrt()?;
            let _ = denominator.g_add_scalar_(o.eps * c2);
            let mut update = self.first.f_div(&denominator)?;
            let _ = update.g_mul_scalar_(-lr * c2 / c1);
            for slot in &mut self.slots {
                if o.weight_decay != 0.0 && slot.shape.len() >= 2 {
                    let _ = slot.tensor.g_mul_scalar_(1.0 - lr * o.weight_decay);
                }
                let part = update.f_narrow(0, slot.begin, slot.count)?.f_view(slot.shape.as_slice())?;
                let _ = slot.tensor.f_add_(&part)?;
            }
            Ok(())
        })
    }

    /// Moments by name: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, copies in the parameters' shapes.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let part = |flat: &Tensor, s: &Slot| flat.narrow(0, s.begin, s.count).view(s.shape.as_slice()).copy();
        let named = |kind: &'static str, flat: &Tensor| {
            self.slots.iter().map(|s| (format!("{kind}.{}", s.name), part(flat, s))).collect::<Vec<_>>()
        };
        let mut out = named("exp_avg", &self.first);
        out.extend(named("exp_avg_sq", &self.second));
        out
    }

    /// Takes moments over from [`AdamW::state`] after `updates` updates. Nothing changes unless all fits.
    ///
    /// # Errors
    /// Names the first moment that is missing or misshapen.
    pub fn load_state(&mut self, named: &[(String, Tensor)], updates: u64) -> Result<()> {
        let find = |kind: &str, s: &Slot| {
            let name = format!("{kind}.{}", s.name);
            let tensor = named.iter().find(|(n, _)| *n == name).map(|(_, t)| t);
            match tensor {
                Some(t) if t.size() == s.shape => {
                    Ok(t.to_kind(s.tensor.kind()).to_device(s.tensor.device()).reshape([-1]))
                }
                Some(t) => {
                    let (found, want) = (t.size(), &s.shape);
                    Err(LearnerError::Setting(format!(
                        "optimiser state `{name}` has shape {found:?}, expected {want:?}"
                    )))
                }
                None => Err(LearnerError::Setting(format!("optimiser state `{name}` is missing"))),
            }
        };
        let gather = |kind: &str| self.slots.iter().map(|s| find(kind, s)).collect::<Result<Vec<_>>>();
        let (first, second) = (gather("exp_avg")?, gather("exp_avg_sq")?);
        self.first = Tensor::f_cat(&first, 0)?;
        self.second = Tensor::f_cat(&second, 0)?;
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule() {
        let o = Optimizer { lr: 1.0, warmup: 4, decay: 0.25, lr_end: 0.1, ..Default::default() };
        let at = |s| lr_at(&o, s, 20);
        assert_eq!((at(0), at(3), at(4), at(14)), (0.25, 1.0, 1.0, 1.0));
        assert!((at(19) - 0.1).abs() < 1e-12 && (at(500) - 0.1).abs() < 1e-12);
        assert!((15..20).all(|s| at(s) < at(s - 1)));
        assert_eq!(lr_at(&Optimizer { lr: 1.0, warmup: 0, decay: 0.0, ..o }, 0, 1), 1.0);
    }

    #[test]
    fn nothing_to_train_and_wrong_kinds_are_errors() {
        let o = Optimizer::default();
        assert!(AdamW::new(&o, &[]).is_err());
        let half = Tensor::zeros([2], (Kind::Half, tch::Device::Cpu));
        let e = AdamW::new(&o, &[("w".into(), half)]).err().map(|e| e.to_string());
        assert!(e.is_some_and(|e| e.contains("`w`") && e.contains("fp32")));
    }

    #[test]
    fn state_round_trip_and_misfits() {
        let w = || Tensor::ones([2, 3], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        let mut a = AdamW::new(&Optimizer::default(), &[("w".into(), w())]).unwrap();
        a.slots[0].tensor.square().sum(Kind::Float).backward();
        let g = a.gradient().unwrap();
        a.step(g, 0.1).unwrap();
        let mut b = AdamW::new(&Optimizer::default(), &[("w".into(), w())]).unwrap();
        b.load_state(&a.state(), a.updates()).unwrap();
        assert_eq!(b.first, a.first);
        assert_eq!((b.updates(), b.second == a.second), (1, true));
        let e = b.load_state(&a.state()[..1], 1).unwrap_err().to_string();
        assert!(e.contains("exp_avg_sq.w"), "{e}");
    }
}
