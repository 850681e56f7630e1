//! AdamW over what this rank owns of all parameters, global-norm clipping, learning-rate schedule. State is keyed by parameter
//! name.
//!
//! Must not know: what the gradients are of. All that is owned lies in flat tensors, so that an update is about a dozen large
//! operations rather than ten small ones per parameter. Parameters of fewer digits than fp32 have master weights in fp32, and so
//! have those that are divided over ranks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use tch::{Kind, Tensor, no_grad};
use unveil_collective::Collective;
use unveil_config::schema::Optimizer;

use crate::error::{LearnerError, Result};
use crate::shard::{Course, Gathered, Gradients, Plan, Ranks, Slot, Stretch, SumsTime, Zero, end};

/// Learning rate of update number `step` (from 0) of `total`: linear warm-up, constant, then linear from `lr` to
/// `lr * lr_end` over the last `decay` share of the updates.
pub fn lr_at(o: &Optimizer, step: u64, total: u64) -> f64 {
    let falling = (o.decay * total as f64).max(1.0);
    let fallen = ((step + 1) as f64 - (total as f64 - falling)).clamp(0.0, falling) / falling;
    let rise = ((step + 1) as f64 / o.warmup.max(1) as f64).min(1.0);
    let fall = if o.decay > 0.0 { 1.0 - fallen * (1.0 - o.lr_end) } else { 1.0 };
    o.lr * rise.min(fall)
}

/// What this rank owns of all gradients, flat, with the global L2 norm.
pub struct Gradient {
    flat: Tensor,
    /// Norm before clipping; not finite when any gradient is not.
    pub norm: f64,
}

/// AdamW (arXiv 1711.05101, algorithm 2): decoupled decay of matrices only (2 dimensions or more), bias-corrected moments in
/// fp32. Same update as `torch.optim.AdamW` up to rounding. Moments, and master weights where there are any, are divided over
/// the shards of a replica (ZeRO, arXiv 1910.02054).
pub struct AdamW {
    options: Optimizer,
    ranks: Rc<Ranks>,
    plan: Rc<Plan>,
    gradients: Rc<RefCell<Gradients>>,
    /// Kind of moments and master weights.
    kind: Kind,
    first: Tensor,
    second: Tensor,
    /// Weights in `kind`; none where the parameters are that themselves.
    master: Option<Tensor>,
    /// By parameter, updates that it took part in.
    counts: Vec<u64>,
    /// By parameter, whether it is trained now.
    active: Vec<bool>,
    updates: u64,
}

impl AdamW {
    /// An optimiser of one rank for leaf parameters, moments at 0.
    ///
    /// # Errors
    /// As [`AdamW::divided`].
    pub fn new(options: &Optimizer, parameters: &[(String, Tensor)]) -> Result<Self> {
        Self::divided(options, parameters, Ranks::solo())
    }

    /// An optimiser for leaf parameters, which are the same on all `ranks`; moments at 0, in fp32, or in fp64 for such parameters.
    ///
    /// # Errors
    /// No parameter, a parameter twice, or kinds that cannot be trained.
    pub fn divided(options: &Optimizer, parameters: &[(String, Tensor)], ranks: Rc<Ranks>) -> Result<Self> {
        let Some((_, any)) = parameters.first() else {
            return Err(LearnerError::Setting("nothing is trained: every parameter is frozen".into()));
        };
        let double = any.kind() == Kind::Double;
        for (name, tensor) in parameters {
            let kind = tensor.kind();
            if double != (kind == Kind::Double) || !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16) {
                return Err(LearnerError::Setting(format!(
                    "parameter `{name}` is {kind:?}: training needs fp32 or bf16 weights, or all in fp64"
                )));
            }
        }
        let kind = if double { Kind::Double } else { Kind::Float };
        let plan = Rc::new(Plan::new(parameters, ranks.size() > 1, ranks.shard())?);
        let gradients = Rc::new(RefCell::new(Gradients::new(plan.clone(), ranks.clone(), kind)));
        let zeros = || Tensor::f_zeros([plan.numel], (kind, any.device()));
        let (counts, active) = (vec![0; parameters.len()], vec![true; parameters.len()]);
        let (options, first, second) = (options.clone(), zeros()?, zeros()?);
        let mut made =
            Self { options, ranks, plan, gradients, kind, first, second, master: None, counts, active, updates: 0 };
        if made.ranks.shards().is_some() || parameters.iter().any(|(_, t)| t.kind() != kind) {
            made.master = Some(made.plan.owned(kind, |s| Ok(s.tensor.shallow_clone()))?);
        }
        Ok(made)
    }

    /// Number of scalars that are trained.
    pub fn numel(&self) -> i64 {
        self.plan.slots().map(|s| s.count).sum()
    }

    /// Bytes of moments and master weights over all shards.
    pub fn bytes(&self) -> u64 {
        let kept = if self.master.is_some() { 3 } else { 2 };
        self.numel() as u64 * kept * self.kind.elt_size_in_bytes() as u64
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// How passes of the model take gradients; `gathered` is where its parameters are divided.
    pub(crate) fn course(&self, gathered: Option<Rc<Gathered>>) -> Course {
        let by_layer = self.ranks.size() > 1;
        Course { gathered, gradients: Some(self.gradients.clone()), by_layer }
    }

    /// The parameters, and what this rank owns of their weights; none where nothing is divided.
    pub(crate) fn source(&self) -> Option<(Rc<Plan>, Tensor)> {
        self.master.as_ref().map(|m| (self.plan.clone(), m.shallow_clone()))
    }

    /// Trains exactly the parameters that `filter` names from here on. The others keep weights and moments.
    pub fn train(&mut self, filter: impl Fn(&str) -> bool) {
        for (slot, active) in self.plan.slots().zip(&mut self.active) {
            *active = filter(&slot.name);
            let _ = slot.tensor.set_requires_grad(*active);
        }
    }

    /// Forgets the gradients of the last backward pass.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn zero_grad(&mut self) -> Result<()> {
        self.gradients.borrow_mut().clear()
    }

    /// Gathers what the backward passes of one rank left in the parameters.
    ///
    /// # Errors
    /// As [`AdamW::gradient`].
    pub fn take_gradient(&mut self) -> Result<Gradient> {
        let pass = self.course(None).begin()?;
        pass.turn(true);
        pass.finish()?;
        self.gradient()
    }

    /// The gradients that passes took, summed over ranks; a parameter that the loss did not touch counts 0.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn gradient(&mut self) -> Result<Gradient> {
        let flat = self.gradients.borrow_mut().finish()?;
        let mut norm = no_grad(|| norm(&flat))?;
        if let Some(shards) = self.ranks.shards() {
            let square = Tensor::f_from_slice(&[norm * norm])?.f_to_device(flat.device())?;
            norm = shards.all_reduce(square)?.f_double_value(&[0])?.sqrt();
        }
        Ok(Gradient { flat, norm })
    }

    /// The time of sums over ranks since it was asked for last.
    pub(crate) fn take_sums_time(&mut self) -> SumsTime {
        self.gradients.borrow_mut().take_time()
    }

    /// Copies of a gradient's parts in the parameters' shapes, by name. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn by_name(&self, gradient: &Gradient) -> Result<Vec<(String, Tensor)>> {
        self.whole("", &gradient.flat)
    }

    /// Clips by global norm as `torch.nn.utils.clip_grad_norm_` does, then applies one update at learning rate `lr`. All ranks
    /// call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn step(&mut self, gradient: Gradient, lr: f64) -> Result<()> {
        self.updates += 1;
        for (count, _) in self.counts.iter_mut().zip(&self.active).filter(|(_, active)| **active) {
            *count += 1;
        }
        let clip = self.options.clip_norm;
        no_grad(|| {
            let mut flat = gradient.flat;
            if clip > 0.0 && gradient.norm > clip {
                let _ = flat.g_mul_scalar_(clip / (gradient.norm + 1e-6));
            }
            for (run, count) in self.runs() {
                self.advance(&flat, run, count, lr)?;
            }
            // Divided parameters take theirs when they are gathered next.
            if self.ranks.zero() == Zero::Parameters { Ok(()) } else { self.spread() }
        })
    }

    /// Stretches of what is owned whose parameters are trained and took part in equally many updates.
    fn runs(&self) -> Vec<(Range<i64>, u64)> {
        if self.active.iter().all(|a| *a) && self.counts.iter().all(|c| *c == self.counts[0]) {
            return vec![(0..self.plan.numel, self.counts[0])];
        }
        let mut runs: Vec<(Range<i64>, u64)> = Vec::new();
        for piece in self.plan.pieces.iter().filter(|p| self.active[p.slot]) {
            let count = self.counts[piece.slot];
            match runs.last_mut() {
                Some((run, c)) if *c == count && run.end == piece.own.start => run.end = piece.own.end,
                _ => runs.push((piece.own.clone(), count)),
            }
        }
        runs
    }

    /// Moments and weights of one stretch, by update number `count` of its parameters.
    fn advance(&mut self, gradient: &Tensor, run: Range<i64>, count: u64, lr: f64) -> Result<()> {
        let o = &self.options;
        let [b1, b2] = o.betas;
        let t = count as f64;
        let (c1, c2) = (1.0 - b1.powf(t), (1.0 - b2.powf(t)).sqrt());
        let of = |t: &Tensor| t.f_narrow(0, run.start, run.end - run.start);
        let (mut g, mut first, mut second) = (of(gradient)?, of(&self.first)?, of(&self.second)?);
        let _ = first.f_lerp_(&g, 1.0 - b1)?;
        let _ = g.square_();
        let _ = second.f_lerp_(&g, 1.0 - b2)?;
        // m / c1 / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + eps c2): fewer passes over memory.
        let mut denominator = second.f_sqrt()?;
        let _ = denominator.g_add_scalar_(o.eps * c2);
        let mut update = first.f_div(&denominator)?;
        let _ = update.g_mul_scalar_(-lr * c2 / c1);
        let decayed = |p: &&crate::shard::Piece| p.matrix && o.weight_decay != 0.0;
        let pieces = self.plan.pieces.iter().filter(|p| run.start <= p.own.start && p.own.end <= run.end);
        if let Some(master) = &self.master {
            for p in pieces.filter(decayed) {
                let _ =
                    master.f_narrow(0, p.own.start, p.own.end - p.own.start)?.g_mul_scalar_(1.0 - lr * o.weight_decay);
            }
            let _ = of(master)?.f_add_(&update)?;
            return Ok(());
        }
        // Nothing is divided and parameters are their own masters: every piece is a whole parameter.
        let slots: Vec<_> = self.plan.slots().collect();
        for p in pieces {
            let slot = slots[p.slot];
            let mut tensor = slot.tensor.shallow_clone();
            if decayed(&p) {
                let _ = tensor.g_mul_scalar_(1.0 - lr * o.weight_decay);
            }
            let part = update.f_narrow(0, p.own.start - run.start, slot.count)?.f_view(slot.shape.as_slice())?;
            let _ = tensor.f_add_(&part)?;
        }
        Ok(())
    }

    /// Writes master weights, where there are any, to the parameters.
    fn spread(&self) -> Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let mut coming = Vec::new();
        for block in &self.plan.blocks {
            let own = master.f_narrow(0, block.at, block.size())?.f_to_kind(block.kind)?.f_contiguous()?;
            coming.push(match self.ranks.shards() {
                Some(group) => Err(group.start_all_gather(own)?),
                None => Ok(own),
            });
        }
        for (block, own) in self.plan.blocks.iter().zip(coming) {
            let whole = match (own, self.ranks.shards()) {
                (Err(work), Some(group)) => end(group, work)?,
                (Err(_), None) => continue,
                (Ok(whole), _) => whole,
            };
            for slot in &block.slots {
                slot.tensor.shallow_clone().f_copy_(&block.part(&whole, slot)?)?;
            }
        }
        Ok(())
    }

    /// What all ranks own, by the parameters' names behind `prefix`, in their shapes.
    fn whole(&self, prefix: &str, flat: &Tensor) -> Result<Vec<(String, Tensor)>> {
        no_grad(|| {
            let mut out = Vec::new();
            for block in &self.plan.blocks {
                let own = flat.f_narrow(0, block.at, block.size())?;
                let whole = match self.ranks.shards() {
                    Some(group) => group.all_gather(own)?,
                    None => own,
                };
                for slot in &block.slots {
                    out.push((format!("{prefix}{}", slot.name), block.part(&whole, slot)?.copy()));
                }
            }
            Ok(out)
        })
    }

    /// The weights of all parameters, to their last digit, by name. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn weights(&self) -> Result<Vec<(String, Tensor)>> {
        match &self.master {
            Some(master) => self.whole("", master),
            None => Ok(self.plan.slots().map(|s| (s.name.clone(), s.tensor.shallow_clone())).collect()),
        }
    }

    /// Takes the parameters' weights over to their last digit: those that rank 0 gives by name, else those that the parameters have.
    /// All ranks call it.
    ///
    /// # Errors
    /// Names a weight that is misshapen; or a rank is gone.
    pub fn load_weights(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let of = |s: &Slot| match named.iter().find(|(n, _)| *n == s.name) {
            None => Ok(s.tensor.shallow_clone()),
            Some((_, t)) if t.size() == s.shape => Ok(t.shallow_clone()),
            Some((_, t)) => Err(LearnerError::Setting(format!(
                "the weight `{}` has shape {:?}, the parameter {:?}",
                s.name,
                t.size(),
                s.shape
            ))),
        };
        let own = match self.ranks.all() {
            None => self.plan.owned(self.kind, of)?,
            Some(all) => no_grad(|| {
                let mut parts = Vec::with_capacity(self.plan.blocks.len());
                for block in &self.plan.blocks {
                    let first = all.rank() == 0;
                    let whole = block.join(self.kind, |s| if first { of(s).map(Some) } else { Ok(None) })?;
                    parts.push(all.broadcast(whole, 0)?.f_narrow(0, block.own.start, block.size())?);
                }
                Ok::<_, LearnerError>(Tensor::f_cat(&parts, 0)?)
            })?,
        };
        no_grad(|| master.shallow_clone().f_copy_(&own).map(drop))?;
        Ok(())
    }

    /// Moments by name: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, copies in the parameters' shapes; and
    /// `step.<parameter>` where a parameter took part in fewer updates than there were. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = self.whole("exp_avg.", &self.first)?;
        out.extend(self.whole("exp_avg_sq.", &self.second)?);
        for (slot, count) in self.plan.slots().zip(&self.counts).filter(|(_, count)| **count != self.updates) {
            out.push((format!("step.{}", slot.name), Tensor::f_from_slice(&[*count as f32])?));
        }
        Ok(out)
    }

    /// Part `part` of what this rank owns of weights (to their last digit) and moments, where they are: for a checkpoint, and to be
    /// overwritten from one.
    pub(crate) fn stretches(&self, part: (usize, usize)) -> Result<Vec<(&'static str, Stretch)>> {
        let sources =
            [("weight", self.master.as_ref()), ("exp_avg", Some(&self.first)), ("exp_avg_sq", Some(&self.second))];
        let mut out = Vec::new();
        for (kind, flat) in sources {
            out.extend(self.plan.stretches(flat, part)?.into_iter().map(|s| (kind, s)));
        }
        Ok(out)
    }

    /// The names of the parameters.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.plan.slots().map(|s| s.name.as_str())
    }

    /// Kind of moments and master weights.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Updates of the parameters that took part in fewer than there were.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        let counted = self.plan.slots().zip(&self.counts).filter(|(_, count)| **count != self.updates);
        counted.map(|(s, count)| (s.name.clone(), *count)).collect()
    }

    /// Goes on after `updates` updates, in fewer of which the parameters of `counts` took part, from weights and moments that were
    /// written to [`AdamW::stretches`]: the parameters get the weights. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn go_on(&mut self, updates: u64, counts: &BTreeMap<String, u64>) -> Result<()> {
        self.updates = updates;
        self.counts = self.plan.slots().map(|s| counts.get(&s.name).copied().unwrap_or(updates)).collect();
        no_grad(|| self.spread())
    }
}

/// Numbers whose squares are summed in their own kind; beyond that in fp64. One sum over millions of them in fp32 is off by 1e-4
/// and more.
const NORM_RUN: i64 = 4096;

/// The L2 norm of a flat tensor.
fn norm(flat: &Tensor) -> Result<f64> {
    let count = flat.numel() as i64;
    let whole = count / NORM_RUN * NORM_RUN;
    let rows = flat.f_narrow(0, 0, whole)?.f_view([-1, NORM_RUN])?;
    let of = |t: &Tensor| t.f_norm_scalaropt_dim(2, [-1i64].as_slice(), false)?.f_to_kind(Kind::Double)?.f_norm();
    let (most, rest) = (of(&rows)?, of(&flat.f_narrow(0, whole, count - whole)?.f_view([1, count - whole])?)?);
    Ok(most.f_double_value(&[])?.hypot(rest.f_double_value(&[])?))
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
    fn norms_of_many_numbers_keep_their_digits() {
        tch::manual_seed(1);
        for count in [1, 4095, 4096, 5_000_001] {
            let flat = Tensor::randn([count], (Kind::Float, tch::Device::Cpu));
            let exact = flat.to_kind(Kind::Double).norm().double_value(&[]);
            let found = norm(&flat).unwrap();
            assert!((found - exact).abs() <= 1e-6 * exact, "{count}: {found} {exact}");
        }
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
    fn state_round_trip() {
        let w = || Tensor::ones([2, 3], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        let own = w();
        let mut a = AdamW::new(&Optimizer::default(), &[("w".into(), own.shallow_clone())]).unwrap();
        own.square().sum(Kind::Float).backward();
        let g = a.take_gradient().unwrap();
        a.step(g, 0.1).unwrap();
        let other = w();
        let mut b = AdamW::new(&Optimizer::default(), &[("w".into(), other.shallow_clone())]).unwrap();
        for ((kind, from), (k, to)) in a.stretches((0, 1)).unwrap().into_iter().zip(b.stretches((0, 1)).unwrap()) {
            assert_eq!((kind, from.begin, &from.shape), (k, to.begin, &to.shape));
            no_grad(|| to.numbers.shallow_clone().copy_(&from.numbers));
        }
        b.go_on(a.updates(), &BTreeMap::from([("w".into(), 7)])).unwrap();
        assert!(b.first == a.first && b.second == a.second && other == own && other.requires_grad());
        assert_eq!((b.updates(), b.counts(), a.counts().len()), (1, BTreeMap::from([("w".into(), 7)]), 0));
    }
}
