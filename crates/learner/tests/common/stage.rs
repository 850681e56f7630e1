//! A whole small run in a folder: model, synthetic records, configuration; and a worker that generates with the real engine.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tch::{Device, Kind};
use unveil_config::Config;
use unveil_core::Sampling;
use unveil_data::fits::Limits;
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_data::synth::{RECORDS_FILE, SynthSpec, generate};
use unveil_data::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
use unveil_engine::{Engine, EngineOptions, GroupInput, GroupRequest, random::group_key};
use unveil_learner::{Dataset, EventSink, Progress, Stage};
use unveil_model::{InitSpec, Prompt, SpecialIds, Vlm, init};
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::{breakdown_to_wire, response_to_wire, v1};
use unveil_rollout::sync::WeightReceiver;
use unveil_service::{CancellationToken, limited};

use crate::common::{breakdown, low_tokens};

pub struct Small {
    pub dir: tempfile::TempDir,
    pub config: Config,
}

impl Small {
    pub fn new(records: usize) -> Self {
        tch::set_num_threads(1);
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model0");
        std::fs::create_dir(&model).unwrap();
        let vocabulary = write_tiny(&model, &TinyProcessorSpec::default()).unwrap();
        let s = &vocabulary.special;
        let special = SpecialIds {
            image_pad: s.image_pad,
            video_pad: s.video_pad,
            vision_start: s.vision_start,
            vision_end: s.vision_end,
            bos: None,
            eos: s.im_end,
            pad: s.end_of_text,
        };
        let (family, preset) = ("qwen2_5_vl".into(), "tiny".into());
        init(&InitSpec { family, preset, vocab_size: vocabulary.vocab_size, seed: 1, special }, &model).unwrap();
        let spec = SynthSpec { train: records, seed: 3, ..Default::default() };
        generate(&spec, &dir.path().join("data"), |_, _| {}).unwrap();
        let mut config = Config::default();
        config.run.dir = dir.path().join("run").display().to_string();
        config.run.threads = 1;
        config.learner.threads = 1;
        config.run.device = "cpu".into();
        config.rollout.n = 4;
        config.rollout.max_new_tokens = 6;
        config.learner.groups = 2;
        config.learner.optimizer.lr = 1e-3;
        Self { dir, config }
    }

    pub fn model(&self) -> PathBuf {
        self.dir.path().join("model0")
    }

    pub fn run(&self) -> PathBuf {
        self.config.run.dir.clone().into()
    }

    pub fn data(&self) -> Arc<Dataset> {
        let records = RecordFile::load(&self.dir.path().join("data").join(RECORDS_FILE)).unwrap();
        let preparer = Arc::new(Preparer::load(&self.model()).unwrap());
        Arc::new(Dataset::new(&self.config, records, preparer).unwrap())
    }

    /// The same, whose items must fit.
    pub fn data_within(&self, limits: Limits) -> Dataset {
        let data = Arc::try_unwrap(self.data()).ok().expect("no other owner");
        data.within(limits)
    }

    /// A stage whose events go to `events`, writing its model to `out`.
    pub fn stage<'a>(
        &'a self,
        model: &'a Path,
        out: &'a Path,
        events: &'a mut dyn EventSink,
        progress: &'a mut dyn Progress,
        cancel: CancellationToken,
    ) -> Stage<'a> {
        let (config, data) = (&self.config, self.data());
        Stage { config, model_dir: model, out, data, environment: vec![], cancel, events, progress, evaluator: None }
    }
}

/// Cancels when an event of `kind` reaches `step`.
pub struct StopAt {
    pub kind: &'static str,
    pub step: u64,
    pub cancel: CancellationToken,
    pub seen: Vec<Value>,
}

impl EventSink for StopAt {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        if event["kind"] == self.kind && event["step"] == self.step {
            self.cancel.cancel();
        }
        self.seen.push(event.clone());
        Ok(())
    }
}

/// A worker of this name sends groups whose `format` is masked.
pub const BLIND: &str = "blind";
/// A worker of this name cannot make any record but the first.
pub const PICKY: &str = "picky";

/// Leases, generates and submits until the run is over or the service is gone. Returns how many groups were accepted.
pub fn work(address: SocketAddr, model: PathBuf, name: &str) -> std::thread::JoinHandle<u64> {
    let name = name.to_owned();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(worker(address, &model, &name))
    })
}

async fn worker(address: SocketAddr, model: &Path, name: &str) -> u64 {
    let preparer = Preparer::load(model).unwrap();
    let vlm = Vlm::load(model, Device::Cpu, Kind::Float).unwrap();
    let banned = preparer.tokenizer().special().banned.clone();
    let mut engine = Engine::new(vlm, EngineOptions { banned, ..Default::default() }).unwrap();
    let patience = std::time::Duration::from_secs(5);
    let channel = unveil_service::connect(&address.to_string(), patience).await.unwrap();
    let mut client = limited!(ExperienceClient::new(channel));
    let mut receiver = WeightReceiver::connect(&address.to_string(), name, patience).await.unwrap();
    let mut accepted = 0;
    loop {
        let weights = receiver.held();
        let ask = v1::LeaseRequest { worker: name.into(), max_groups: 2, wait_ms: 2000, weights, ..Default::default() };
        let Ok(answer) = client.lease(ask).await else { return accepted };
        let answer = answer.into_inner();
        if answer.finished {
            return accepted;
        }
        if receiver.held().is_none_or(|h| h.version != answer.version) {
            let update = receiver.fetch(patience).await.unwrap().unwrap();
            update.load_into(&mut engine).unwrap();
            receiver.taken(update);
        }
        let held = receiver.held().unwrap();
        let first = |g: &v1::LeasedGroup| g.group.as_ref().is_some_and(|g| g.record.ends_with("-000000"));
        let (made, failed): (Vec<_>, Vec<_>) = answer.groups.into_iter().partition(|g| name != PICKY || first(g));
        for group in failed {
            let (cause, why) = (v1::release_request::Cause::Failed.into(), "it cannot be made".to_owned());
            let back = v1::ReleaseRequest { worker: name.into(), leases: vec![group.lease], cause, why };
            let Ok(_) = client.release(back).await else { return accepted };
        }
        if made.is_empty() {
            continue;
        }
        for submission in generate_groups(&mut engine, &preparer, made, name, held) {
            let Ok(verdict) = client.submit(submission).await else { return accepted };
            accepted += u64::from(verdict.into_inner().verdict() == v1::submit_response::Verdict::Accepted);
        }
    }
}

fn generate_groups(
    engine: &mut Engine<Vlm>,
    preparer: &Preparer,
    groups: Vec<v1::LeasedGroup>,
    name: &str,
    held: v1::HeldWeights,
) -> Vec<v1::SubmitRequest> {
    let request = |g: &v1::LeasedGroup| {
        let record: unveil_core::Record = serde_json::from_str(&g.record_json).unwrap();
        let made = preparer.prepare_bytes(&g.image, &record.id, &record.question).unwrap();
        let prompt = Prompt { tokens: made.prompt.ids, grids: vec![made.image.grid_thw.map(|v| v as i64)] };
        let key = g.group.as_ref().unwrap();
        GroupRequest {
            input: GroupInput { id: record.id, prompt, patches: made.image.patches.into(), hashes: vec![] },
            key: group_key(&[&key.pass.to_le_bytes(), key.record.as_bytes()]),
            sampling: Sampling {
                n: g.n as usize,
                temperature: g.temperature,
                max_new_tokens: g.max_new_tokens as usize,
                seed: g.seed,
                ..Default::default()
            },
            stop: None,
        }
    };
    let requests: Vec<GroupRequest> = groups.iter().map(request).collect();
    let outputs = engine.generate(&requests, None).unwrap();
    let submission = |(g, out): (v1::LeasedGroup, unveil_engine::GroupOutput)| {
        let id = g.group.clone().unwrap().record;
        let (mut responses, mut breakdowns) = (Vec::new(), Vec::new());
        for r in out.responses {
            let text = preparer.tokenizer().decode(&r.tokens).unwrap();
            let mut scored = breakdown(&id, r.index, low_tokens(&r.tokens));
            if name == BLIND {
                let masked = unveil_core::Component::masked(unveil_core::MaskReason::NoAttention);
                scored.components.insert("format".into(), masked);
            }
            breakdowns.push(breakdown_to_wire(&scored));
            let (index, finish) = (r.index, r.finish);
            let r = unveil_core::Response {
                index,
                tokens: r.tokens,
                text,
                logprobs: r.logprobs,
                versions: r.versions,
                finish,
            };
            responses.push(response_to_wire(&r, &[], None));
        }
        v1::SubmitRequest {
            worker: name.into(),
            lease: g.lease,
            group: g.group,
            responses,
            breakdowns,
            generate_ms: 1.0,
            reward_ms: 1.0,
            weights: vec![held],
        }
    };
    groups.into_iter().zip(outputs).map(submission).collect()
}

/// The address of a learner of one rank.
pub fn experience(ready: unveil_learner::Ready) -> std::net::SocketAddr {
    match ready {
        unveil_learner::Ready::Experience(address) => address,
        _ => panic!("there is one rank"),
    }
}
