//! Checkpoints of learners of several ranks (real processes, Gloo): any number of ranks resumes from them under any ZeRO stage.

use std::time::Duration;

use tokio::runtime::Runtime;
use unveil_checkpoint::{
    Access, CheckpointHeader, Checkpoints, Reader, Resume, Retention, Store, WriteReport, WriteTask, list,
    resume_candidates, verify, write,
};
use unveil_learner::{HostBufferPool, copy_to_host, read_state};
use unveil_model::read_safetensors;
use unveil_testkit_model::rank_processes::{ALL_BATCHES, BATCHES, RankSpec, record, relative_difference, run, serve};
use unveil_trainer::{PolicyTrainer, TrainerProgress};

/// The test that is the process of a rank.
const RANK: &str = "rank_checkpoints::rank";
/// Environment variable of ranks that resume from the newest checkpoint.
const RESUME: &str = "UNVEIL_TEST_RESUME";
/// Environment variable of ranks that save a checkpoint at the end.
const SAVE: &str = "UNVEIL_TEST_SAVE";

/// The process of one rank, started by another test.
#[test]
#[ignore = "started by another test"]
fn rank() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    serve(
        |spec, learner| {
            if is_set(RESUME) {
                resume(spec, learner);
            }
        },
        |spec, learner| {
            if is_set(SAVE) {
                save(spec, learner);
            }
        },
    );
}

/// Opens the checkpoint store of the test.
fn checkpoints(spec: &RankSpec) -> (Runtime, Store) {
    let runtime = Runtime::new().unwrap();
    let place = spec.dir.join("run");
    let none: [(&str, &str); 0] = [];
    let store = runtime.block_on(Store::open(place.to_str().unwrap(), none, Access::Write)).unwrap();
    (runtime, store)
}

/// Writes the shard of a rank; rank 0 commits once all ranks have written theirs.
fn save(spec: &RankSpec, learner: &PolicyTrainer) {
    let (runtime, store) = checkpoints(spec);
    let report = |rank: usize| spec.dir.join(format!("report-{}-{rank}.json", learner.step()));
    runtime.block_on(async {
        let retention = Retention { keep: 9, keep_best: false, keep_every: 0 };
        let mut held = None;
        if spec.rank == 0 {
            held = Some(Checkpoints::claim(store.clone(), retention).await.unwrap());
        }
        let copied = copy_to_host(&learner.state_to_save().unwrap(), &HostBufferPool::default()).unwrap();
        // Every save claims a new term.
        let term = list(&store).await.unwrap().len() as u64 + 1;
        let task = WriteTask { step: learner.step(), term, rank: spec.rank, objects: copied.objects };
        let write_report = write(&store, task).await.unwrap();
        let whole = report(spec.rank).with_extension("part");
        std::fs::write(&whole, serde_json::to_vec(&write_report).unwrap()).unwrap();
        std::fs::rename(&whole, report(spec.rank)).unwrap();
        let Some(mut held) = held else { return };
        assert_eq!(held.term(), term);
        let mut reports: Vec<WriteReport> = Vec::new();
        for rank in 0..spec.world {
            while !report(rank).exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            reports.push(serde_json::from_slice(&std::fs::read(report(rank)).unwrap()).unwrap());
        }
        let bytes = |r: &WriteReport| r.objects.iter().map(|o| o.size).sum::<u64>() as f64;
        let most = reports.iter().map(bytes).fold(0.0, f64::max);
        let mean = reports.iter().map(bytes).sum::<f64>() / spec.world as f64;
        assert!(most < 1.2 * mean + 65536.0, "ranks write similar amounts: at most {most}, {mean} on average");
        let meta = serde_json::to_value(learner.progress()).unwrap();
        held.commit(CheckpointHeader { step: learner.step(), meta, best: false }, reports).await.unwrap();
    });
}

/// Resumes and checks that the saved state was restored bit for bit.
fn resume(spec: &RankSpec, learner: &mut PolicyTrainer) {
    let (runtime, store) = checkpoints(spec);
    let info = runtime.block_on(resume_candidates(&store, Resume::Auto)).unwrap().next_candidate().unwrap().unwrap();
    let reader = runtime.block_on(Reader::open(&store, &info)).unwrap();
    read_state(&learner.state_to_load().unwrap(), runtime.handle(), &reader).unwrap();
    let stand: TrainerProgress = serde_json::from_value(reader.manifest().meta.clone()).unwrap();
    learner.resume_from(&stand).unwrap();
    assert_eq!((learner.step(), learner.progress()), (info.step, stand));
    let (weights, moments) = learner.state().unwrap();
    let saved = read_safetensors(&spec.dir.join("before.safetensors")).unwrap();
    assert_eq!(saved.len(), weights.len() + moments.len());
    for (name, tensor) in weights.iter().chain(&moments) {
        let wanted = &saved.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(tensor, wanted, "{name}");
        if let Some(own) = learner.vlm().parameter(name) {
            assert_eq!(own, wanted, "{name}");
        }
    }
}

/// Performs one run over all batches with other ranks and another ZeRO stage for each, through checkpoints.
#[test]
fn checkpoints_can_be_resumed_by_any_number_of_ranks() {
    for ppo in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        record(dir.path());
        let solo = RankSpec { dir: dir.path().into(), double: true, ppo, critic: ppo, ..ALL_BATCHES };
        let (wanted, state) = run(&solo, RANK, &[]).remove(0);
        let of_loss = 1e-9;
        let of_state = 1e-9;
        let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
        let mut last = Vec::new();
        let worlds = [(1, 0, 0), (2, 3, 0), (4, 2, 2), (2, 0, 0), (1, 0, 0)];
        for (b, (world, zero, shards)) in worlds.into_iter().enumerate() {
            let spec = RankSpec { world, zero, shards, batches: (b, b + 1), ..solo.clone() };
            let resume = (b > 0).then_some((RESUME, "1"));
            let save = (b + 1 < BATCHES).then_some((SAVE, "1"));
            last = run(&spec, RANK, &resume.into_iter().chain(save).collect::<Vec<_>>());
            let update = &last[0].0[0];
            let wanted = &wanted[b];
            for (actual, wanted) in [(update.loss, wanted.loss), (update.grad_norm, wanted.grad_norm)] {
                let off = (actual - wanted).abs();
                assert!(off <= of_loss * wanted.abs().max(1e-6), "batch {b}: {actual}, wanted {wanted}");
            }
            std::fs::copy(dir.path().join("state-0.safetensors"), dir.path().join("before.safetensors")).unwrap();
        }
        for (name, wanted) in &state {
            let tensor = &last[0].1.iter().find(|(n, _)| n == name).unwrap().1;
            let plain = name.trim_start_matches("critic.");
            let before = base.iter().find(|(n, _)| unveil_model::canonical_name(n) == plain).map(|(_, t)| t);
            let off = match before {
                Some(b) => {
                    relative_difference(&(tensor - b.to_kind(tensor.kind())), &(wanted - b.to_kind(tensor.kind())))
                }
                None => relative_difference(tensor, wanted),
            };
            assert!(off <= of_state, "{name} is {off:e} away");
        }
        let (runtime, store) = checkpoints(&solo);
        let shown = runtime.block_on(verify(&store, None)).unwrap();
        assert!(shown.len() > 10 && shown.iter().all(|o| o.ok), "{shown:?}");
    }
}
