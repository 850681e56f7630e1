//! Fixture of a small run (model, synthetic records, configuration), and a worker that generates with the real engine.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tch::{Device, Kind};
use unveil_config::Config;
use unveil_data::records::RecordFile;
use unveil_datasets::synth::{RECORDS_FILE, SynthSpec, generate};
use unveil_engine::{Engine, EngineOptions, GroupRequest, PromptInput, random::group_key};
use unveil_experience_rpc::WeightReceiver;
use unveil_learner::{Dataset, EventSink, Progress, Stage};
use unveil_model::Vlm;
use unveil_preprocess::context_fit::TokenLimits;
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::{breakdown_to_wire, response_to_wire, sampling_from_wire, v1};
use unveil_rollout::load_update;
use unveil_service::{CancellationToken, limited};
use unveil_testkit_model::{breakdown, low_tokens, write_model_directory};

/// A run in a temporary directory.
pub(crate) struct SmallRun {
    pub dir: tempfile::TempDir,
    pub config: Config,
}

impl SmallRun {
    pub(crate) fn new(records: usize) -> Self {
        tch::set_num_threads(1);
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model0");
        write_model_directory(&model, 1);
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

    pub(crate) fn model(&self) -> PathBuf {
        self.dir.path().join("model0")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.config.run.dir.clone().into()
    }

    pub(crate) fn data(&self) -> Arc<Dataset> {
        let records = RecordFile::load(&self.dir.path().join("data").join(RECORDS_FILE)).unwrap();
        let preprocessor = Arc::new(Preprocessor::load(&self.model()).unwrap());
        Arc::new(Dataset::new(&self.config, records, preprocessor).unwrap())
    }

    /// Returns the data with limits for its items.
    pub(crate) fn data_with_limits(&self, limits: TokenLimits) -> Dataset {
        let data = Arc::try_unwrap(self.data()).expect("no other owner");
        data.with_limits(limits)
    }

    /// Creates a stage that logs to `events` and exports its model to `out`.
    pub(crate) fn stage<'a>(
        &'a self,
        model: &'a Path,
        out: &'a Path,
        events: &'a mut dyn EventSink,
        progress: &'a mut dyn Progress,
        cancel: CancellationToken,
    ) -> Stage<'a> {
        let config = &self.config;
        let data = self.data();
        Stage { config, model_dir: model, out, data, environment: vec![], cancel, events, progress, evaluator: None }
    }
}

/// An event log that cancels the run at the event of `kind` and `step`.
pub(crate) struct StopAt {
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

/// Name of a worker that submits groups whose `format` is masked.
pub(crate) const BLIND: &str = "blind";
/// Name of a worker that fails on every record but the first.
pub(crate) const PICKY: &str = "picky";

/// Name of a worker that gives all responses the same reward.
pub(crate) const FLAT: &str = "flat";
/// Name of a worker that gives all responses to records with an even number the same reward, and different ones to the others.
pub(crate) const PARTLY_FLAT: &str = "partly-flat";

/// Returns the reward of a response by the worker `name`.
fn reward(name: &str, record: &str, index: usize, tokens: &[u32]) -> Option<f64> {
    let is_even = record.ends_with(['0', '2', '4', '6', '8']);
    match name {
        FLAT => Some(0.5),
        PARTLY_FLAT if is_even => Some(0.5),
        PARTLY_FLAT => Some(0.1 * index as f64),
        _ => low_tokens(tokens),
    }
}

/// Leases, generates and submits on a thread until the run ends or the service stops. Returns the number of accepted
/// groups.
pub(crate) fn work(address: SocketAddr, model: PathBuf, name: &str) -> std::thread::JoinHandle<u64> {
    let name = name.to_owned();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(worker(address, &model, &name))
    })
}

async fn worker(address: SocketAddr, model: &Path, name: &str) -> u64 {
    let preprocessor = Preprocessor::load(model).unwrap();
    let vlm = Vlm::load(model, Device::Cpu, Kind::Float).unwrap();
    let banned = preprocessor.tokenizer().banned().to_vec();
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
            load_update(&mut engine, &update).unwrap();
            receiver.adopt(update);
        }
        let held = receiver.held().unwrap();
        let first = |g: &v1::LeasedGroup| g.group.as_ref().is_some_and(|g| g.record.ends_with("-000000"));
        let (usable, failed): (Vec<_>, Vec<_>) = answer.groups.into_iter().partition(|g| name != PICKY || first(g));
        for group in failed {
            let cause = v1::release_request::Cause::Failed.into();
            let why = "it cannot be made".to_owned();
            let release = v1::ReleaseRequest { worker: name.into(), leases: vec![group.lease], cause, why };
            let Ok(_) = client.release(release).await else { return accepted };
        }
        if usable.is_empty() {
            continue;
        }
        for submission in generate_groups(&mut engine, &preprocessor, usable, name, held) {
            let Ok(verdict) = client.submit(submission).await else { return accepted };
            accepted += u64::from(verdict.into_inner().verdict() == v1::submit_response::Verdict::Accepted);
        }
    }
}

fn generate_groups(
    engine: &mut Engine<Vlm>,
    preprocessor: &Preprocessor,
    groups: Vec<v1::LeasedGroup>,
    name: &str,
    held: v1::HeldWeights,
) -> Vec<v1::SubmitRequest> {
    let request = |g: &v1::LeasedGroup| {
        let record: unveil_core::Record = serde_json::from_str(&g.record_json).unwrap();
        let prepared = preprocessor.prepare_bytes(&g.image, &record.id, &record).unwrap();
        let key = g.group.as_ref().unwrap();
        GroupRequest {
            input: PromptInput {
                id: record.id,
                prompt: prepared.prompt,
                patches: prepared.image.patches.into(),
                hashes: vec![],
            },
            key: group_key(&[&key.pass.to_le_bytes(), key.record.as_bytes()]),
            sampling: sampling_from_wire(g.sampling).unwrap(),
            stop: None,
        }
    };
    let requests: Vec<GroupRequest> = groups.iter().map(request).collect();
    let outputs = engine.generate(&requests, None).unwrap();
    let submission = |(g, out): (v1::LeasedGroup, unveil_engine::GroupOutput)| {
        let id = g.group.clone().unwrap().record;
        let mut responses = Vec::new();
        let mut breakdowns = Vec::new();
        for r in out.responses {
            let text = preprocessor.tokenizer().decode(&r.tokens).unwrap();
            let mut scored = breakdown(&id, r.index, reward(name, &id, r.index, &r.tokens));
            if name == BLIND {
                let masked = unveil_core::Component::masked(unveil_core::MaskReason::NoAttention);
                scored.components.insert("format".into(), masked);
            }
            breakdowns.push(breakdown_to_wire(&scored));
            let index = r.index;
            let finish = r.finish;
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

/// Returns the address of the experience service of a learner with one rank.
pub(crate) fn experience(ready: unveil_learner::Ready) -> std::net::SocketAddr {
    match ready {
        unveil_learner::Ready::Experience(address) => address,
        _ => panic!("there is one rank"),
    }
}
