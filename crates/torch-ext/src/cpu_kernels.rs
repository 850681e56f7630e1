//! CPU kernels: matrix products of few rows, and decode steps behind shared prefixes, where libtorch's operations cost more to start
//! than to run. Each kernel is built for several instruction sets; the best one that this machine supports is used.

use std::cell::Cell;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::library::NativeLibrary;
use crate::{ExtError, Result};

/// Weights and KV caches of one layer: contiguous, fp32, on the CPU.
#[derive(Debug)]
pub struct DecodeLayer<'a> {
    /// RMS norm before attention `[D]`.
    pub norm1: &'a Tensor,
    /// Projections to queries `[Hq d, D]`, keys and values `[Hkv d, D]`.
    pub qkv: [&'a Tensor; 3],
    /// Biases of the projections.
    pub qkv_bias: Option<[&'a Tensor; 3]>,
    /// RMS norms of queries and keys over the head `[d]`.
    pub qk_norm: Option<(&'a Tensor, &'a Tensor)>,
    /// Output projection `[D, Hq d]`.
    pub o: &'a Tensor,
    /// RMS norm before the MLP `[D]`.
    pub norm2: &'a Tensor,
    /// Gate and up projections `[I, D]`.
    pub gate_up: [&'a Tensor; 2],
    /// Down projection `[D, I]`.
    pub down: &'a Tensor,
    /// Keys and values of the prefixes `[S, Hkv, P, d]`.
    pub prefix: [&'a Tensor; 2],
    /// Keys and values of the rows `[R, Hkv, L, d]`; the step appends its own.
    pub suffix: [&'a Tensor; 2],
    /// Set if the layer's attention over images is captured: keys of the image tokens `[S, Hkv, V, d]`, and 1 for each captured head
    /// (`None`: all heads).
    pub capture: Option<(&'a Tensor, Option<&'a [u8]>)>,
}

/// A decode step: one token for each fed row.
#[derive(Debug)]
pub struct DecodeStep<'a> {
    /// Numbers of query heads and of key/value heads.
    pub heads: (i64, i64),
    /// Responses per slot.
    pub n: i64,
    /// Epsilon of the RMS norms.
    pub eps: f64,
    /// Embeddings `[A, D]`.
    pub x: &'a Tensor,
    /// Cosines and sines `[A, d / 2]`.
    pub rotary: [&'a Tensor; 2],
    /// Cache rows of the fed tokens `[A]`, ascending.
    pub rows: &'a [i64],
    /// Response tokens that each fed row already holds `[A]`.
    pub lengths: &'a [i64],
    /// Prefix length of each slot in tokens `[S]`.
    pub prefix: &'a [i64],
    /// Image tokens of each slot `[S]`.
    pub images: &'a [i64],
    /// Weight of one head's attention in the sum over heads and layers.
    pub head_weight: f64,
}

#[repr(C)]
struct CLayer {
    norm1: *const f32,
    qkv: [*const f32; 3],
    qkv_bias: [*const f32; 3],
    q_norm: *const f32,
    k_norm: *const f32,
    o: *const f32,
    norm2: *const f32,
    gate: *const f32,
    up: *const f32,
    down: *const f32,
    prefix_k: *const f32,
    prefix_v: *const f32,
    suffix_k: *mut f32,
    suffix_v: *mut f32,
    image_k: *const f32,
    heads: *const u8,
}

#[repr(C)]
struct CStep {
    fed: i64,
    hidden: i64,
    intermediate: i64,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    slots: i64,
    n: i64,
    prompt: i64,
    response: i64,
    images: i64,
    eps: f32,
    head_weight: f32,
    threads: i32,
    x: *mut f32,
    cos: *const f32,
    sin: *const f32,
    row: *const i64,
    lengths: *const i64,
    prefix: *const i64,
    image: *const i64,
    attention: *mut f32,
}

type LinearFn = unsafe extern "C" fn(*const f32, i64, i64, *const f32, i64, *const f32, *mut f32, i32);
type DecodeFn = unsafe extern "C" fn(*const CStep, *const CLayer, i64);

/// The functions of cpp/cpu/step.cc.
#[derive(Debug)]
struct Functions {
    linear: LinearFn,
    decode: DecodeFn,
}

/// The kernels built for one instruction set.
struct KernelBuild {
    name: &'static str,
    bytes: &'static [u8],
    /// Returns whether this machine supports the instruction set.
    is_supported: fn() -> bool,
    library: OnceLock<Result<NativeLibrary, String>>,
    functions: OnceLock<Result<Functions, String>>,
}

macro_rules! kernel_build {
    ($level:literal, $is_supported:expr) => {
        KernelBuild {
            name: $level,
            bytes: include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_cpu_", $level, ".so")),
            is_supported: $is_supported,
            library: OnceLock::new(),
            functions: OnceLock::new(),
        }
    };
}

/// All builds, best first. Only tests use the last: the vectors of the first, lowered to the instructions of the second.
#[cfg(target_arch = "x86_64")]
static BUILDS: [KernelBuild; 4] = [
    kernel_build!("x86_64_v4", || v3()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")),
    kernel_build!("x86_64_v3", v3),
    kernel_build!("x86_64", || true),
    kernel_build!("x86_64_v3_wide", v3),
];

#[cfg(target_arch = "x86_64")]
fn v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe")
}

#[cfg(not(target_arch = "x86_64"))]
static BUILDS: [KernelBuild; 1] = [kernel_build!("native", || true)];

thread_local! {
    /// The build that [`with_instruction_set`] has selected for this thread.
    static SELECTED: Cell<Option<&'static KernelBuild>> = const { Cell::new(None) };
}

/// Returns the instruction sets that the kernels are built for and this machine supports, the default first. For tests.
#[doc(hidden)]
pub fn instruction_sets() -> Vec<&'static str> {
    BUILDS.iter().filter(|b| (b.is_supported)()).map(|b| b.name).collect()
}

/// Runs `work` with the calling thread's kernels taken from the build for one of [`instruction_sets`]. For tests.
///
/// # Errors
/// Returns [`ExtError::Unavailable`] if this machine does not support the instruction set or the kernels cannot be loaded.
#[doc(hidden)]
pub fn with_instruction_set<T>(name: &str, work: impl FnOnce() -> T) -> Result<T> {
    struct RestoreSelection(Option<&'static KernelBuild>);
    impl Drop for RestoreSelection {
        fn drop(&mut self) {
            SELECTED.set(self.0);
        }
    }
    let supported = BUILDS.iter().find(|b| b.name == name && (b.is_supported)());
    let reason = || format!("`{name}` is not one of {}", instruction_sets().join(", "));
    let build = supported.ok_or_else(|| ExtError::Unavailable { library: "CPU", reason: reason() })?;
    build.functions()?;
    let _restore = RestoreSelection(SELECTED.replace(Some(build)));
    Ok(work())
}

fn functions() -> Result<&'static Functions> {
    static BEST: OnceLock<Option<&'static KernelBuild>> = OnceLock::new();
    let best = || *BEST.get_or_init(|| BUILDS.iter().find(|b| (b.is_supported)()));
    match SELECTED.get().or_else(best) {
        Some(build) => build.functions(),
        None => Err(ExtError::Unavailable { library: "CPU", reason: "it is not built for this processor".into() }),
    }
}

impl KernelBuild {
    fn functions(&'static self) -> Result<&'static Functions> {
        let open = || NativeLibrary::load("unveil_cpu", self.bytes, "it was built for another kind of processor");
        let load = || look_up(self.library.get_or_init(open).as_ref().map_err(Clone::clone)?);
        let loaded = self.functions.get_or_init(load).as_ref();
        loaded.map_err(|e| ExtError::Unavailable { library: "CPU", reason: e.clone() })
    }
}

fn look_up(library: &'static NativeLibrary) -> Result<Functions, String> {
    // SAFETY: the types are those of cpp/cpu/step.cc.
    unsafe { Ok(Functions { linear: library.get(b"unveil_linear")?, decode: library.get(b"unveil_decode")? }) }
}

/// Returns the memory of a tensor after checking that it is contiguous, fp32, on the CPU, and of the given shape.
fn checked_memory(what: &'static str, t: &Tensor, shape: &[i64]) -> Result<*mut f32> {
    if t.kind() == Kind::Float && t.device() == Device::Cpu && t.is_contiguous() && t.size() == shape {
        return Ok(t.data_ptr().cast());
    }
    Err(ExtError::Tensor { what, found: format!("{t:?}"), expected: shape.to_vec() })
}

/// Computes `x W^T (+ bias)` for `x [M, K]`, `weight [N, K]`, `bias [N]`, all contiguous fp32 on the CPU; records no gradient. A row's
/// result does not depend on the other rows.
///
/// # Errors
/// Returns [`ExtError::Tensor`] if a tensor has another dtype or shape, and [`ExtError::Unavailable`] if the kernels cannot be loaded.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (m, n, k) = match (&x.size()[..], &weight.size()[..]) {
        (&[m, k], &[n, _]) => (m, n, k),
        _ => return Err(ExtError::Tensor { what: "input", found: format!("{x:?}"), expected: vec![0, 0] }),
    };
    let px = checked_memory("input", x, &[m, k])?;
    let pw = checked_memory("weight", weight, &[n, k])?;
    let pb = bias.map(|b| checked_memory("bias", b, &[n])).transpose()?.unwrap_or(std::ptr::null_mut());
    let out = Tensor::empty([m, n], (Kind::Float, Device::Cpu));
    let threads = tch::get_num_threads();
    // SAFETY: all memory has the sizes that are passed, by the checks above.
    unsafe { (functions()?.linear)(px, m, k, pw, n, pb, out.data_ptr().cast(), threads) };
    Ok(out)
}

/// Runs a decode step through `layers`. Returns hidden states `[A, D]` (before the last norm) and, if layers capture, what each
/// key/value head adds to the attention rows `[Hkv, A, V]`. Records no gradient.
///
/// # Errors
/// Returns [`ExtError::Tensor`] if a tensor has another dtype or shape, [`ExtError::Index`] if an index is out of range, and
/// [`ExtError::Unavailable`] if the kernels cannot be loaded.
pub fn decode(step: &DecodeStep<'_>, layers: &[DecodeLayer<'_>]) -> Result<(Tensor, Option<Tensor>)> {
    let Some(first) = layers.first() else { return Ok((step.x.copy(), None)) };
    let (hq, hkv) = step.heads;
    let wrong = |what, t: &Tensor| ExtError::Tensor { what, found: format!("{t:?}"), expected: Vec::new() };
    let &[a, hidden] = &step.x.size()[..] else { return Err(wrong("embeddings", step.x)) };
    let &[slots, _, prompt, d] = &first.prefix[0].size()[..] else { return Err(wrong("prefix", first.prefix[0])) };
    let &[rows, _, response, _] = &first.suffix[0].size()[..] else { return Err(wrong("suffix", first.suffix[0])) };
    let &[intermediate, _] = &first.gate_up[0].size()[..] else { return Err(wrong("gate", first.gate_up[0])) };
    let images = layers.iter().find_map(|l| l.capture).map(|(keys, _)| keys.size().get(2).copied().unwrap_or(0));
    check_indices(step, a, slots, [rows, prompt, response, images.unwrap_or(i64::MAX)])?;
    if hkv < 1 || hq % hkv != 0 || d % 2 != 0 {
        return Err(ExtError::Index { what: "heads", value: hq, limit: hkv });
    }
    let kv = [slots, hkv, prompt, d];
    let layer = |l: &DecodeLayer<'_>| -> Result<CLayer> {
        let none = std::ptr::null();
        let mut out = CLayer {
            norm1: checked_memory("norm1", l.norm1, &[hidden])?,
            qkv: [none; 3],
            qkv_bias: [none; 3],
            q_norm: none,
            k_norm: none,
            o: checked_memory("o", l.o, &[hidden, hq * d])?,
            norm2: checked_memory("norm2", l.norm2, &[hidden])?,
            gate: checked_memory("gate", l.gate_up[0], &[intermediate, hidden])?,
            up: checked_memory("up", l.gate_up[1], &[intermediate, hidden])?,
            down: checked_memory("down", l.down, &[hidden, intermediate])?,
            prefix_k: checked_memory("prefix keys", l.prefix[0], &kv)?,
            prefix_v: checked_memory("prefix values", l.prefix[1], &kv)?,
            suffix_k: checked_memory("suffix keys", l.suffix[0], &[rows, hkv, response, d])?,
            suffix_v: checked_memory("suffix values", l.suffix[1], &[rows, hkv, response, d])?,
            image_k: none,
            heads: std::ptr::null(),
        };
        for (i, width) in [hq * d, hkv * d, hkv * d].into_iter().enumerate() {
            out.qkv[i] = checked_memory("qkv", l.qkv[i], &[width, hidden])?;
            if let Some(bias) = l.qkv_bias {
                out.qkv_bias[i] = checked_memory("qkv bias", bias[i], &[width])?;
            }
        }
        if let Some((q, k)) = l.qk_norm {
            (out.q_norm, out.k_norm) = (checked_memory("query norm", q, &[d])?, checked_memory("key norm", k, &[d])?);
        }
        if let Some((keys, heads)) = l.capture {
            out.image_k = checked_memory("image keys", keys, &[slots, hkv, images.unwrap_or(0), d])?;
            if let Some(heads) = heads {
                if heads.len() as i64 != hq {
                    return Err(ExtError::Index { what: "captured heads", value: heads.len() as i64, limit: hq });
                }
                out.heads = heads.as_ptr();
            }
        }
        Ok(out)
    };
    let c_layers = layers.iter().map(layer).collect::<Result<Vec<_>>>()?;
    let functions = functions()?;
    let x = step.x.copy();
    let attention = images.map(|v| Tensor::zeros([hkv, a, v], (Kind::Float, Device::Cpu)));
    let c_step = CStep {
        fed: a,
        hidden,
        intermediate,
        heads: hq,
        kv_heads: hkv,
        head_dim: d,
        slots,
        n: step.n,
        prompt,
        response,
        images: images.unwrap_or(0),
        eps: step.eps as f32,
        head_weight: step.head_weight as f32,
        threads: tch::get_num_threads(),
        x: checked_memory("embeddings", &x, &[a, hidden])?,
        cos: checked_memory("cosines", step.rotary[0], &[a, d / 2])?,
        sin: checked_memory("sines", step.rotary[1], &[a, d / 2])?,
        row: step.rows.as_ptr(),
        lengths: step.lengths.as_ptr(),
        prefix: step.prefix.as_ptr(),
        image: step.images.as_ptr(),
        attention: attention.as_ref().map_or(std::ptr::null_mut(), |t| t.data_ptr().cast()),
    };
    // SAFETY: every pointer is to memory of the size that the step states, checked above, which outlives the call.
    unsafe { (functions.decode)(&c_step, c_layers.as_ptr(), c_layers.len() as i64) };
    Ok((x, attention))
}

/// Checks the lengths and ranges of a step's indices.
fn check_indices(step: &DecodeStep<'_>, a: i64, slots: i64, [rows, prompt, response, images]: [i64; 4]) -> Result<()> {
    let within = |what, values: &[i64], count: i64, limit: i64| {
        if values.len() as i64 != count {
            return Err(ExtError::Index { what, value: values.len() as i64, limit: count });
        }
        match values.iter().find(|v| **v < 0 || **v > limit) {
            Some(v) => Err(ExtError::Index { what, value: *v, limit }),
            None => Ok(()),
        }
    };
    within("rows", step.rows, a, rows - 1)?;
    within("response lengths", step.lengths, a, response - 1)?;
    within("prefix lengths", step.prefix, slots, prompt)?;
    within("image tokens", step.images, slots, images)?;
    if step.n < 1 || step.n.checked_mul(slots) != Some(rows) || !step.rows.is_sorted_by(|a, b| a < b) {
        return Err(ExtError::Index { what: "rows per slot", value: step.n, limit: rows });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes around every block and vector width, on every instruction set that this machine supports.
    #[test]
    fn linear_equals_torch_and_is_independent_per_row() {
        let r = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        for set in instruction_sets() {
            tch::manual_seed(7);
            let check = || {
                for k in [3, 15, 16, 17, 40, 67, 96] {
                    for n in [1, 24, 50, 101] {
                        let x = r(&[33, k]);
                        let w = r(&[n, k]);
                        let b = r(&[n]);
                        let exact = x.to_kind(Kind::Double);
                        let exact = exact.linear(&w.to_kind(Kind::Double), Some(b.to_kind(Kind::Double)));
                        let alone: Vec<Tensor> =
                            (0..33).map(|i| linear(&x.narrow(0, i, 1), &w, Some(&b)).unwrap()).collect();
                        for m in [1, 2, 3, 4, 5, 8, 32, 33] {
                            let out = linear(&x.narrow(0, 0, m), &w, Some(&b)).unwrap();
                            assert!((&out - exact.narrow(0, 0, m)).abs().max().double_value(&[]) < 1e-4);
                            assert_eq!(out, Tensor::cat(&alone[..m as usize], 0), "{set}: {m} rows, {n} x {k}");
                        }
                    }
                }
            };
            with_instruction_set(set, check).unwrap();
        }
        let x = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
        let w = Tensor::zeros([3, 5], (Kind::Float, Device::Cpu));
        assert!(linear(&x, &w, None).unwrap_err().to_string().contains("weight"));
    }

    #[test]
    fn unsupported_instruction_sets_are_refused() {
        assert!(!instruction_sets().is_empty());
        let e = with_instruction_set("mmx", || ()).unwrap_err().to_string();
        assert!(e.contains("`mmx` is not one of"), "{e}");
    }
}
