//! AdamW over this rank's shard of the parameters, and clipping by global norm. State is keyed by parameter name.
//!
//! The shard is kept in flat tensors, so that an update is about a dozen large operations instead of ten small ones per parameter.
//! Parameters in bf16 have master weights in fp32, and so have sharded parameters.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use tch::{Kind, Tensor, no_grad};
use unveil_collective::Collective;
use unveil_config::schema::Optimizer;

use crate::error::{Result, TrainerError};
use crate::learning_rate::relative_rates;
use crate::shard::{
    GradientReducer, OwnedRange, ParameterSlice, ParameterSlot, PassHooks, Ranks, ReduceTiming, ShardLayout,
    ShardedParameters, ZeroStage, wait,
};

/// This rank's shard of the gradients, flat, and the L2 norm of all gradients.
#[derive(Debug)]
pub struct Gradient {
    flat: Tensor,
    /// Global norm before clipping; not finite if any gradient is not.
    pub norm: f64,
}

/// AdamW (arXiv 1711.05101, algorithm 2): decoupled decay of matrices only (2 dimensions or more), bias-corrected moments in
/// fp32. The update equals that of `torch.optim.AdamW` up to rounding. Moments, and master weights if there are any, are sharded over
/// the ranks of a replica (ZeRO, arXiv 1910.02054).
#[derive(Debug)]
pub struct AdamW {
    options: Optimizer,
    ranks: Rc<Ranks>,
    layout: Rc<ShardLayout>,
    gradients: Rc<RefCell<GradientReducer>>,
    /// Dtype of moments and master weights.
    kind: Kind,
    /// First moment.
    exp_avg: Tensor,
    /// Second moment.
    exp_avg_sq: Tensor,
    /// Master weights in `kind`; `None` if the parameters serve as such.
    master: Option<Tensor>,
    /// By parameter, the number of updates it took part in.
    counts: Vec<u64>,
    /// By parameter, whether it is being trained.
    active: Vec<bool>,
    /// By parameter, its learning rate relative to that of an update.
    rates: Vec<f64>,
    updates: u64,
}

impl AdamW {
    /// Returns an optimiser on a single rank for leaf parameters, with moments of 0.
    ///
    /// # Errors
    /// See [`AdamW::sharded`].
    pub fn new(options: &Optimizer, parameters: &[(String, Tensor)]) -> Result<Self> {
        Self::sharded(options, parameters, Ranks::solo())
    }

    /// Returns an optimiser, sharded over `ranks`, for leaf parameters that are the same on all of them. Moments start at 0, in fp32,
    /// or in fp64 for fp64 parameters.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if there is no parameter, one is given twice, a dtype cannot be trained, or a group of parameters
    /// is empty.
    pub fn sharded(options: &Optimizer, parameters: &[(String, Tensor)], ranks: Rc<Ranks>) -> Result<Self> {
        let Some((_, first_parameter)) = parameters.first() else {
            return Err(TrainerError::Setting("nothing is trained: every parameter is frozen".into()));
        };
        let double = first_parameter.kind() == Kind::Double;
        for (name, tensor) in parameters {
            let kind = tensor.kind();
            if double != (kind == Kind::Double) || !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16) {
                return Err(TrainerError::Setting(format!(
                    "parameter `{name}` is {kind:?}: training needs fp32 or bf16 weights, or all in fp64"
                )));
            }
        }
        let kind = if double { Kind::Double } else { Kind::Float };
        let layout = Rc::new(ShardLayout::new(parameters, ranks.size() > 1, ranks.shard())?);
        let gradients = Rc::new(RefCell::new(GradientReducer::new(layout.clone(), ranks.clone(), kind)));
        let rates = relative_rates(options, layout.slots().map(|s| s.name.as_str()))?;
        let zeros = || Tensor::f_zeros([layout.numel], (kind, first_parameter.device()));
        let exp_avg = zeros()?;
        let exp_avg_sq = zeros()?;
        let mut optimizer = Self {
            options: options.clone(),
            ranks,
            layout,
            gradients,
            kind,
            exp_avg,
            exp_avg_sq,
            master: None,
            counts: vec![0; parameters.len()],
            active: vec![true; parameters.len()],
            rates,
            updates: 0,
        };
        if optimizer.ranks.shards().is_some() || parameters.iter().any(|(_, t)| t.kind() != kind) {
            let master = optimizer.layout.owned_values(kind, |s| Ok(s.tensor.shallow_clone()))?;
            optimizer.master = Some(master);
        }
        Ok(optimizer)
    }

    /// Returns the number of scalars in all parameters.
    pub fn numel(&self) -> i64 {
        self.layout.slots().map(|s| s.count).sum()
    }

    /// Returns the bytes of moments and master weights, summed over all shards.
    pub fn bytes(&self) -> u64 {
        let copies = if self.master.is_some() { 3 } else { 2 };
        self.numel() as u64 * copies * self.kind.elt_size_in_bytes() as u64
    }

    /// Returns the number of updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Returns the hooks that collect gradients from passes of the model; `sharded` are its parameters if they are sharded.
    pub(crate) fn hooks(&self, sharded: Option<Rc<ShardedParameters>>) -> PassHooks {
        let by_layer = self.ranks.size() > 1;
        PassHooks { sharded, gradients: Some(self.gradients.clone()), by_layer }
    }

    /// Returns the layout of the parameters and this rank's shard of the master weights; `None` without master weights.
    pub(crate) fn master_shard(&self) -> Option<(Rc<ShardLayout>, Tensor)> {
        self.master.as_ref().map(|m| (self.layout.clone(), m.shallow_clone()))
    }

    /// Trains only the parameters that `filter` accepts from now on. The others keep their weights and moments.
    pub fn set_trained(&mut self, filter: impl Fn(&str) -> bool) {
        for (slot, active) in self.layout.slots().zip(&mut self.active) {
            *active = filter(&slot.name);
            let _ = slot.tensor.set_requires_grad(*active);
        }
    }

    /// Drops all gradients collected so far.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn zero_grad(&mut self) -> Result<()> {
        self.gradients.borrow_mut().clear()
    }

    /// Collects the gradients that plain backward passes on a single rank left in the parameters.
    ///
    /// # Errors
    /// See [`AdamW::gradient`].
    pub fn collect_gradient(&mut self) -> Result<Gradient> {
        let pass = self.hooks(None).begin()?;
        pass.begin_backward(true);
        pass.end_backward()?;
        self.gradient()
    }

    /// Returns the gradients of the hooked passes, reduced over ranks; a parameter without a gradient counts as 0.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gradient(&mut self) -> Result<Gradient> {
        let flat = self.gradients.borrow_mut().finish()?;
        let mut norm = no_grad(|| l2_norm(&flat))?;
        if let Some(shards) = self.ranks.shards() {
            let square = Tensor::f_from_slice(&[norm * norm])?.f_to_device(flat.device())?;
            norm = shards.all_reduce(square)?.f_double_value(&[0])?.sqrt();
        }
        Ok(Gradient { flat, norm })
    }

    /// Returns the time of gradient reductions since the last call, and resets it.
    pub(crate) fn take_reduce_timing(&mut self) -> ReduceTiming {
        self.gradients.borrow_mut().take_timing()
    }

    /// Returns copies of all gradients in the parameters' shapes, by name. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gradient_by_name(&self, gradient: &Gradient) -> Result<Vec<(String, Tensor)>> {
        self.gather_by_name("", &gradient.flat)
    }

    /// Clips by global norm as `torch.nn.utils.clip_grad_norm_` does, then applies one update with learning rate `lr`. All ranks
    /// call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
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
            for (range, count, rate) in self.uniform_ranges() {
                self.update_range(&flat, range, count, lr * rate)?;
            }
            // Sharded parameters get the new weights when they are gathered next.
            if self.ranks.zero_stage() == ZeroStage::Parameters { Ok(()) } else { self.write_back() }
        })
    }

    /// Returns ranges of the shard whose parameters are being trained, each with the number of updates its parameters took part in and
    /// their relative learning rate.
    fn uniform_ranges(&self) -> Vec<(Range<i64>, u64, f64)> {
        let is_uniform =
            |slot: usize| self.active[slot] && self.counts[slot] == self.counts[0] && self.rates[slot] == self.rates[0];
        if (0..self.active.len()).all(is_uniform) {
            return vec![(0..self.layout.numel, self.counts[0], self.rates[0])];
        }
        let mut ranges: Vec<(Range<i64>, u64, f64)> = Vec::new();
        for owned in self.layout.owned_ranges.iter().filter(|o| self.active[o.slot]) {
            let count = self.counts[owned.slot];
            let rate = self.rates[owned.slot];
            match ranges.last_mut() {
                Some((range, c, r)) if *c == count && *r == rate && range.end == owned.range.start => {
                    range.end = owned.range.end;
                }
                _ => ranges.push((owned.range.clone(), count, rate)),
            }
        }
        ranges
    }

    /// Updates moments and weights of one range of the shard, as update number `count` of its parameters.
    fn update_range(&mut self, gradient: &Tensor, range: Range<i64>, count: u64, lr: f64) -> Result<()> {
        let o = &self.options;
        let [b1, b2] = o.betas;
        let t = count as f64;
        let c1 = 1.0 - b1.powf(t);
        let c2 = (1.0 - b2.powf(t)).sqrt();
        let in_range = |t: &Tensor| t.f_narrow(0, range.start, range.end - range.start);
        let mut g = in_range(gradient)?;
        let mut exp_avg = in_range(&self.exp_avg)?;
        let mut exp_avg_sq = in_range(&self.exp_avg_sq)?;
        let _ = exp_avg.f_lerp_(&g, 1.0 - b1)?;
        let _ = g.square_();
        let _ = exp_avg_sq.f_lerp_(&g, 1.0 - b2)?;
        // m / c1 / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + eps c2): fewer passes over memory.
        let mut denominator = exp_avg_sq.f_sqrt()?;
        let _ = denominator.g_add_scalar_(o.eps * c2);
        let mut update = exp_avg.f_div(&denominator)?;
        let _ = update.g_mul_scalar_(-lr * c2 / c1);
        let is_decayed = |owned: &&OwnedRange| owned.matrix && o.weight_decay != 0.0;
        let owned_ranges = &self.layout.owned_ranges;
        let owned_ranges = owned_ranges.iter().filter(|o| range.start <= o.range.start && o.range.end <= range.end);
        if let Some(master) = &self.master {
            for owned in owned_ranges.filter(is_decayed) {
                let length = owned.range.end - owned.range.start;
                let mut weights = master.f_narrow(0, owned.range.start, length)?;
                let _ = weights.g_mul_scalar_(1.0 - lr * o.weight_decay);
            }
            let _ = in_range(master)?.f_add_(&update)?;
            return Ok(());
        }
        // Without sharding and master weights every owned range is a whole parameter.
        let slots: Vec<_> = self.layout.slots().collect();
        for owned in owned_ranges {
            let slot = slots[owned.slot];
            let mut tensor = slot.tensor.shallow_clone();
            if is_decayed(&owned) {
                let _ = tensor.g_mul_scalar_(1.0 - lr * o.weight_decay);
            }
            let delta =
                update.f_narrow(0, owned.range.start - range.start, slot.count)?.f_view(slot.shape.as_slice())?;
            let _ = tensor.f_add_(&delta)?;
        }
        Ok(())
    }

    /// Writes the master weights, if there are any, to the parameters.
    fn write_back(&self) -> Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let mut shards = Vec::new();
        for bucket in &self.layout.buckets {
            let shard = master.f_narrow(0, bucket.offset, bucket.size())?.f_to_kind(bucket.kind)?.f_contiguous()?;
            shards.push(match self.ranks.shards() {
                Some(group) => Err(group.start_all_gather(shard)?),
                None => Ok(shard),
            });
        }
        for (bucket, shard) in self.layout.buckets.iter().zip(shards) {
            let flat = match (shard, self.ranks.shards()) {
                (Err(work), Some(group)) => wait(group, work)?,
                (Err(_), None) => continue,
                (Ok(flat), _) => flat,
            };
            for slot in &bucket.slots {
                slot.tensor.shallow_clone().f_copy_(&bucket.view_of(&flat, slot)?)?;
            }
        }
        Ok(())
    }

    /// Gathers the shards of all ranks, and returns copies in the parameters' shapes, named `prefix` and the parameter's name.
    fn gather_by_name(&self, prefix: &str, flat: &Tensor) -> Result<Vec<(String, Tensor)>> {
        no_grad(|| {
            let mut out = Vec::new();
            for bucket in &self.layout.buckets {
                let shard = flat.f_narrow(0, bucket.offset, bucket.size())?;
                let gathered = match self.ranks.shards() {
                    Some(group) => group.all_gather(shard)?,
                    None => shard,
                };
                for slot in &bucket.slots {
                    out.push((format!("{prefix}{}", slot.name), bucket.view_of(&gathered, slot)?.copy()));
                }
            }
            Ok(out)
        })
    }

    /// Returns the master weights of all parameters, by name; the parameters themselves if there are none. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn weights(&self) -> Result<Vec<(String, Tensor)>> {
        match &self.master {
            Some(master) => self.gather_by_name("", master),
            None => Ok(self.layout.slots().map(|s| (s.name.clone(), s.tensor.shallow_clone())).collect()),
        }
    }

    /// Sets the master weights, if there are any, to those that rank 0 gives by name, and for parameters not named to the present
    /// weights. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if a weight has the wrong shape, and [`TrainerError::Ranks`] if another rank has failed or
    /// timed out.
    pub fn load_weights(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let weight_of = |s: &ParameterSlot| match named.iter().find(|(n, _)| *n == s.name) {
            None => Ok(s.tensor.shallow_clone()),
            Some((_, t)) if t.size() == s.shape => Ok(t.shallow_clone()),
            Some((_, t)) => Err(TrainerError::Setting(format!(
                "weight `{}` has shape {:?}, but the parameter has shape {:?}",
                s.name,
                t.size(),
                s.shape
            ))),
        };
        let owned = match self.ranks.world() {
            None => self.layout.owned_values(self.kind, weight_of)?,
            Some(world) => no_grad(|| {
                let mut parts = Vec::with_capacity(self.layout.buckets.len());
                for bucket in &self.layout.buckets {
                    let is_source = world.rank() == 0;
                    let flat =
                        bucket.flatten(self.kind, |s| if is_source { weight_of(s).map(Some) } else { Ok(None) })?;
                    parts.push(world.broadcast(flat, 0)?.f_narrow(0, bucket.owned.start, bucket.size())?);
                }
                Ok::<_, TrainerError>(Tensor::f_cat(&parts, 0)?)
            })?,
        };
        no_grad(|| master.shallow_clone().f_copy_(&owned).map(drop))?;
        Ok(())
    }

    /// Returns copies of the moments in the parameters' shapes, `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, and
    /// `step.<parameter>` for each parameter that missed some updates. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = self.gather_by_name("exp_avg.", &self.exp_avg)?;
        out.extend(self.gather_by_name("exp_avg_sq.", &self.exp_avg_sq)?);
        for (slot, count) in self.layout.slots().zip(&self.counts).filter(|(_, count)| **count != self.updates) {
            out.push((format!("step.{}", slot.name), Tensor::f_from_slice(&[*count as f32])?));
        }
        Ok(out)
    }

    /// Returns part `part.0` of `part.1` of this rank's shard of weights (in full precision) and moments, as views: for writing a
    /// checkpoint, and for overwriting from one.
    pub(crate) fn owned_slices(&self, part: (usize, usize)) -> Result<Vec<(&'static str, ParameterSlice)>> {
        let sources = [
            ("weight", self.master.as_ref()),
            ("exp_avg", Some(&self.exp_avg)),
            ("exp_avg_sq", Some(&self.exp_avg_sq)),
        ];
        let mut out = Vec::new();
        for (kind, flat) in sources {
            out.extend(self.layout.owned_slices(flat, part)?.into_iter().map(|s| (kind, s)));
        }
        Ok(out)
    }

    /// Iterates over the names of the parameters.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.layout.slots().map(|s| s.name.as_str())
    }

    /// Returns the dtype of moments and master weights.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the number of updates of each parameter that missed some.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        let late = self.layout.slots().zip(&self.counts).filter(|(_, count)| **count != self.updates);
        late.map(|(s, count)| (s.name.clone(), *count)).collect()
    }

    /// Resumes after `updates` updates, of which the parameters in `counts` took part in fewer, from the weights and moments that were
    /// written to [`AdamW::owned_slices`], and copies the weights to the parameters. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn resume(&mut self, updates: u64, counts: &BTreeMap<String, u64>) -> Result<()> {
        self.updates = updates;
        self.counts = self.layout.slots().map(|s| counts.get(&s.name).copied().unwrap_or(updates)).collect();
        no_grad(|| self.write_back())
    }
}

/// Length of the runs whose squares are summed in their own dtype; the sums of runs are added in fp64. One fp32 sum over millions of
/// elements is off by 1e-4 or more.
const NORM_RUN: i64 = 4096;

/// Returns the L2 norm of a flat tensor.
fn l2_norm(flat: &Tensor) -> Result<f64> {
    let count = flat.numel() as i64;
    let in_runs = count / NORM_RUN * NORM_RUN;
    let runs = flat.f_narrow(0, 0, in_runs)?.f_view([-1, NORM_RUN])?;
    let rest = flat.f_narrow(0, in_runs, count - in_runs)?.f_view([1, count - in_runs])?;
    let norm_of_rows =
        |t: &Tensor| t.f_norm_scalaropt_dim(2, [-1i64].as_slice(), false)?.f_to_kind(Kind::Double)?.f_norm();
    // One copy to the host, not one for each norm.
    let norms = Vec::<f64>::try_from(Tensor::f_stack(&[norm_of_rows(&runs)?, norm_of_rows(&rest)?], 0)?)?;
    Ok(norms.into_iter().fold(0.0, f64::hypot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_of_many_elements_is_accurate() {
        tch::manual_seed(1);
        for count in [1, 4095, 4096, 5_000_001] {
            let flat = Tensor::randn([count], (Kind::Float, tch::Device::Cpu));
            let exact = flat.to_kind(Kind::Double).norm().double_value(&[]);
            let computed = l2_norm(&flat).unwrap();
            assert!((computed - exact).abs() <= 1e-6 * exact, "{count}: {computed} {exact}");
        }
    }

    #[test]
    fn missing_parameters_and_wrong_dtypes_are_errors() {
        let o = Optimizer::default();
        assert!(AdamW::new(&o, &[]).is_err());
        let half = Tensor::zeros([2], (Kind::Half, tch::Device::Cpu));
        let e = AdamW::new(&o, &[("w".into(), half)]).err().map(|e| e.to_string());
        assert!(e.is_some_and(|e| e.contains("`w`") && e.contains("fp32")));
    }

    #[test]
    fn state_survives_a_round_trip() {
        let w = || Tensor::ones([2, 3], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        let weight = w();
        let mut a = AdamW::new(&Optimizer::default(), &[("w".into(), weight.shallow_clone())]).unwrap();
        weight.square().sum(Kind::Float).backward();
        let g = a.collect_gradient().unwrap();
        a.step(g, 0.1).unwrap();
        let other = w();
        let mut b = AdamW::new(&Optimizer::default(), &[("w".into(), other.shallow_clone())]).unwrap();
        for ((kind, from), (k, to)) in a.owned_slices((0, 1)).unwrap().into_iter().zip(b.owned_slices((0, 1)).unwrap())
        {
            assert_eq!((kind, from.begin, &from.shape), (k, to.begin, &to.shape));
            no_grad(|| to.values.shallow_clone().copy_(&from.values));
        }
        b.resume(a.updates(), &BTreeMap::from([("w".into(), 7)])).unwrap();
        assert!(b.exp_avg == a.exp_avg && b.exp_avg_sq == a.exp_avg_sq && other == weight && other.requires_grad());
        assert_eq!((b.updates(), b.counts(), a.counts().len()), (1, BTreeMap::from([("w".into(), 7)]), 0));
    }
}
