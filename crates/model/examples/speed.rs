//! Times the tiny preset on the CPU: packed training passes and group generation.
//!
//! `cargo run -p unveil-model --example speed -- [threads] [groups]`

use std::time::Instant;

use tch::{Device, Kind, Tensor};
use unveil_model::{
    AttentionSet, CacheShape, CaptureSpec, InitSpec, PackedBatch, PackedGroup, Prompt, SpecialIds, Vlm, init,
    logprobs_entropy,
};

/// Returns the CPU seconds of all threads of this process so far (Linux); 0 if unknown.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Prints wall time (median) and CPU time (mean) per call, in ms.
fn time(name: &str, mut f: impl FnMut()) {
    f();
    f();
    const RUNS: usize = 15;
    let cpu = cpu_seconds();
    let mut walls: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    walls.sort_by(f64::total_cmp);
    let cpu = (cpu_seconds() - cpu) * 1e3 / RUNS as f64;
    println!("{name:<18}{:8.1} ms wall {cpu:8.1} ms cpu", walls[RUNS / 2]);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let threads = args.first().copied().unwrap_or(1);
    let count = args.get(1).copied().unwrap_or(16);
    tch::set_num_threads(threads as i32);
    let dir = std::env::temp_dir().join(format!("unveil-speed-{}", std::process::id()));
    let special = SpecialIds { image_pad: 3, video_pad: 4, vision_start: 5, vision_end: 6, bos: None, eos: 1, pad: 0 };
    let spec = InitSpec { family: "qwen2_5_vl".into(), preset: "tiny".into(), vocab_size: 1500, seed: 1, special };
    init(&spec, &dir)?;
    let vlm = Vlm::load(&dir, Device::Cpu, Kind::Float)?;
    std::fs::remove_dir_all(&dir)?;
    let patches = 96 / vlm.config().vision.patch_size;
    let grid = [1, patches, patches];
    let images = vlm.config().merged_tokens(grid)?;
    let tokens: Vec<u32> = (20..27).chain([5]).chain(std::iter::repeat_n(3, images)).chain([6]).chain(30..33).collect();
    let prompt = Prompt { tokens, grids: vec![grid] };
    let group = PackedGroup {
        prompt: prompt.clone(),
        responses: (0..8).map(|r| (0..11).map(|i| 40 + r * 11 + i).collect()).collect(),
    };
    let groups = vec![group; count];
    let grids = vec![grid; count];
    let pixels =
        Tensor::randn([count as i64 * patches * patches, vlm.config().vision.patch_len()], (Kind::Float, Device::Cpu));
    let layer = vlm.config().default_capture_layer();

    let n: usize = vlm.set_trainable(|_| true);
    let parameters: usize = vlm.named_parameters().iter().map(|(_, t)| t.numel()).sum();
    println!(
        "{parameters} parameters in {n} tensors, {threads} thread(s), {count} groups of {} + 8 x 11 tokens",
        prompt.tokens.len()
    );
    let clear = || vlm.named_parameters().iter().for_each(|(_, t)| t.shallow_clone().zero_grad());
    let train = |capture: Option<CaptureSpec>| {
        let features = vlm.encode_images(&pixels, &grids).expect("features");
        let batch = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("batch");
        let out = vlm.forward_packed(&batch, Some(&features), capture).expect("forward");
        let (lp, ent) = logprobs_entropy(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[3, 4]);
        lp.mean(Kind::Float) + ent.mean(Kind::Float) * 0.01
    };
    time("build batch", || drop(PackedBatch::build(&groups, vlm.config(), Device::Cpu)));
    time("vision fwd", || drop(tch::no_grad(|| vlm.encode_images(&pixels, &grids))));
    time("vision fwd+bwd", || {
        clear();
        vlm.encode_images(&pixels, &grids).expect("features").sum(Kind::Float).backward();
    });
    let spec = CaptureSpec { set: AttentionSet::layer(layer), differentiable: false };
    time("fwd", || drop(tch::no_grad(|| train(None))));
    time("fwd, captured", || drop(tch::no_grad(|| train(Some(spec.clone())))));
    time("fwd+bwd", || {
        clear();
        train(None).backward();
    });
    vlm.set_trainable(|_| false);
    let generate = || {
        let features = vlm.encode_images(&pixels, &grids).expect("features");
        let prefill = vlm.prefill(&vec![prompt.clone(); count], Some(&features)).expect("prefill");
        let mut hidden = prefill.last_hidden.repeat_interleave_self_int(8, 0, None);
        let shape = CacheShape { slots: count, n: 8, prompt: 0, response: 11, images: 0 };
        let mut cache = vlm.cache(shape, Some(AttentionSet::layer(layer)), false).expect("cache");
        cache.admit(&prefill, &(0..count).collect::<Vec<_>>()).expect("admits");
        let rows: Vec<usize> = (0..cache.rows()).collect();
        for _ in 0..11 {
            let next = unveil_model::masked_logits(&vlm.lm_head(&hidden), 1.0, &[3, 4]).argmax(-1, false);
            hidden = vlm.decode_step(&mut cache, &next, &rows).expect("step").hidden;
        }
    };
    time("generate 8 x 11", || tch::no_grad(generate));
    Ok(())
}
