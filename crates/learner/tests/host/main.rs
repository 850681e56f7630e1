//! The experience host over real gRPC: what is leased, counted, refused, reclaimed, and how weights travel.

#[path = "../common/mod.rs"]
mod common;
mod refused;

use std::sync::Arc;
use std::time::Duration;

use common::{breakdown, record};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use unveil_core::{Finish, Grid, GroupId, Response, Sampling};
use unveil_experience::{Event, Experience, Settings};
use unveil_learner::{GroupInput, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, TrainGroup};
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::v1::submit_response::Verdict;
use unveil_proto::{breakdown_to_wire, response_to_wire, v1};

struct Source;

impl LeaseSource for Source {
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased, LearnerError> {
        if group.record == "bad" {
            return Err(LearnerError::Setting("record \"bad\" has no image".into()));
        }
        let input = GroupInput {
            record: record(&group.record),
            image_size: (64, 64),
            prompt: unveil_model::Prompt { tokens: vec![1, index as u32], grids: vec![] },
            patches: vec![],
            merged: Grid { rows: 2, cols: 2 },
            encoded: Default::default(),
        };
        Ok(Leased { input: Arc::new(input), image: vec![index as u8; 3].into(), image_hash: "h".into() })
    }
}

struct Served {
    runtime: Runtime,
    host: Host,
    client: ExperienceClient<Channel>,
}

fn serve(ids: &[&str], lease_s: f64) -> Served {
    serve_with(ids, lease_s, 0)
}

fn serve_with(ids: &[&str], lease_s: f64, max_staleness: u64) -> Served {
    serve_while_heard(ids, lease_s, max_staleness, lease_s)
}

fn serve_while_heard(ids: &[&str], lease_s: f64, max_staleness: u64, silence_s: f64) -> Served {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let total_groups = Some(4);
    let settings = Settings {
        groups_per_step: 2,
        max_staleness,
        lease_s,
        stall_s: 300.0,
        silence_s,
        seed: 0,
        term: 1,
        total_groups,
    };
    let ids = ids.iter().map(|s| (*s).to_owned()).collect();
    let machine: Experience<TrainGroup> = Experience::new(settings, ids).unwrap();
    let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
    let options =
        HostOptions { listen: "127.0.0.1:0".into(), sampling, stop: vec![], vocab: 50, fixed: None, broadcast: None };
    let host = Host::start(runtime.handle(), options, machine, Arc::new(Source)).unwrap();
    let address = host.address().to_string();
    let channel = runtime.block_on(unveil_service::connect(&address, Duration::from_secs(5))).unwrap();
    Served { client: ExperienceClient::new(channel), host, runtime }
}

impl Served {
    fn lease(&mut self, worker: &str, wait_ms: u32) -> v1::LeaseResponse {
        self.ask(worker, wait_ms, None).unwrap()
    }

    fn ask(
        &mut self,
        worker: &str,
        wait_ms: u32,
        weights: Option<v1::HeldWeights>,
    ) -> Result<v1::LeaseResponse, tonic::Status> {
        let ask = v1::LeaseRequest { worker: worker.into(), max_groups: 2, wait_ms, weights, ..Default::default() };
        self.runtime.block_on(self.client.lease(ask)).map(tonic::Response::into_inner)
    }

    /// Head and data of what a worker gets that holds `holds`, every chunk checked; none when there is nothing newer.
    fn weights(&mut self, holds: Option<v1::HeldWeights>, wait_ms: u32) -> Option<(v1::WeightsHead, Vec<u8>)> {
        let ask = v1::WeightsRequest { worker: "w".into(), holds, wait_ms, joins: None };
        self.runtime.block_on(async {
            let mut stream = self.client.weights(ask).await.unwrap().into_inner();
            let mut chunks = Vec::new();
            while let Some(chunk) = stream.message().await.unwrap() {
                unveil_proto::weights::verify(&chunk).unwrap();
                chunks.push(chunk.data);
            }
            let head = prost::Message::decode(chunks.first()?.clone()).unwrap();
            Some((head, chunks[1..].concat()))
        })
    }

    fn submit(&mut self, request: v1::SubmitRequest) -> Result<Verdict, tonic::Status> {
        self.runtime.block_on(self.client.submit(request)).map(|a| a.into_inner().verdict())
    }
}

fn answer(worker: &str, g: &v1::LeasedGroup, version: u64) -> v1::SubmitRequest {
    let id = g.group.clone().unwrap().record;
    let response = |index| Response {
        index,
        tokens: vec![3, 4],
        text: "ab".into(),
        logprobs: vec![-1.0, -2.0],
        versions: vec![version; 2],
        finish: Finish::Stop,
    };
    v1::SubmitRequest {
        worker: worker.into(),
        lease: g.lease.clone(),
        group: g.group.clone(),
        responses: (0..2).map(|i| response_to_wire(&response(i), &[(0, 1), (1, 2)], None)).collect(),
        breakdowns: (0..2).map(|i| breakdown_to_wire(&breakdown(&id, i, Some(0.5)))).collect(),
        generate_ms: 2.0,
        reward_ms: 1.0,
        weights: vec![held(version)],
    }
}

/// Weights of a version: one tensor that never changes, one that does.
fn named(version: u64) -> Vec<(String, Tensor)> {
    let options = (Kind::Float, Device::Cpu);
    vec![
        ("base".into(), Tensor::arange(400_000, options)),
        ("top".into(), Tensor::full([300_001], version as f64 + 0.5, options)),
    ]
}

fn bytes(named: &[(String, Tensor)]) -> Vec<u8> {
    let one = |t: &Tensor| Vec::<f32>::try_from(t).unwrap().into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    named.iter().flat_map(|(_, t)| one(t)).collect()
}

fn held(version: u64) -> v1::HeldWeights {
    v1::HeldWeights { version, checksum: unveil_proto::weights::Sum::of(&bytes(&named(version))).crc32c }
}

fn publish(host: &Host, version: u64) -> Result<(), LearnerError> {
    let named = named(version);
    host.publish(&NewWeights {
        version,
        named: &named,
        kind: Kind::Float,
        adapters: None,
        changes: &|name| name == "top",
    })
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_batch_comes_together_and_counts_once() {
    let mut s = serve(&["a", "b", "c", "d"], 60.0);
    assert!(s.lease("w", 50).groups.is_empty(), "nothing before the first weights");
    publish(&s.host, 0).unwrap();
    let got = s.lease("w", 1000);
    assert_eq!((got.groups.len(), got.version, got.finished), (2, 0, false));
    assert_eq!((got.groups[0].n, got.groups[0].max_new_tokens, got.groups[0].seed), (2, 4, 7));
    assert!(got.groups[0].record_json.contains("\"boxes\"") && got.groups[0].image.len() == 3);
    assert!(s.lease("other", 50).groups.is_empty(), "strictly on-policy: no more than one batch");
    assert_eq!(s.submit(answer("w", &got.groups[0], 0)).unwrap(), Verdict::Accepted);
    assert_eq!(s.submit(answer("w", &got.groups[0], 0)).unwrap(), Verdict::Duplicate);
    assert!(s.host.next_batch(Duration::from_millis(20)).unwrap().is_none());
    assert_eq!(s.submit(answer("thief", &got.groups[1], 0)).unwrap(), Verdict::Expired);
    assert_eq!(s.submit(answer("w", &got.groups[1], 0)).unwrap(), Verdict::Accepted);
    let batch = s.host.next_batch(SOON).unwrap().unwrap();
    assert_eq!((batch.len(), batch[0].spans[0][1], batch[0].totals()), (2, (1, 2), vec![Some(0.5); 2]));
    assert_eq!(batch[0].input.record.id, batch[0].id.record);
    let ids: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
    s.host.trained(1, &ids).unwrap();
    assert_eq!(s.submit(answer("w", &got.groups[0], 0)).unwrap(), Verdict::Duplicate);
    publish(&s.host, 1).unwrap();
    let next = s.lease("w", 1000);
    assert_eq!((next.version, next.groups[0].min_version), (1, 1));
    assert_eq!(s.submit(answer("w", &next.groups[0], 0)).unwrap(), Verdict::Stale);
    assert_eq!(s.host.snapshot().trained, 2);
}

#[test]
fn weights_travel_in_checked_chunks_and_only_what_changed() {
    let mut s = serve(&["a", "b"], 60.0);
    let ask = v1::WeightsRequest { worker: "w".into(), holds: None, wait_ms: 10, joins: None };
    let none = s.runtime.block_on(s.client.weights(ask));
    assert_eq!(none.err().map(|e| e.code()), Some(tonic::Code::Unavailable));
    publish(&s.host, 0).unwrap();
    let (head, data) = s.weights(None, 0).unwrap();
    assert_eq!((head.version, head.checksum, head.base), (0, held(0).checksum, None));
    assert!(data == bytes(&named(0)));
    assert_eq!(s.weights(Some(held(0)), 10), None, "the worker has the newest");
    // The worker asks before there is something newer; then only what changed travels.
    let (mut client, ask) = (
        s.client.clone(),
        v1::WeightsRequest { worker: "w".into(), holds: Some(held(0)), wait_ms: 20_000, joins: None },
    );
    let waiting = s.runtime.spawn(async move {
        let mut stream = client.weights(ask).await.unwrap().into_inner();
        let first = stream.message().await.unwrap().unwrap();
        prost::Message::decode(first.data).map(|head: v1::WeightsHead| (head.version, head.base))
    });
    std::thread::sleep(Duration::from_millis(50));
    publish(&s.host, 1).unwrap();
    assert_eq!(s.runtime.block_on(waiting).unwrap().unwrap(), (1, Some(held(0))));
    let (head, data) = s.weights(Some(held(0)), 0).unwrap();
    assert_eq!((head.version, head.checksum, head.base), (1, held(1).checksum, Some(held(0))));
    assert_eq!(head.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["top"]);
    assert!(data == bytes(&named(1)[1..]));
    // Weights of a learner that is gone, or damaged ones, are no base.
    for strange in [v1::HeldWeights { version: 9, checksum: 1 }, v1::HeldWeights { checksum: 1, ..held(0) }] {
        assert_eq!(s.weights(Some(strange), 0).unwrap().1.len(), 700_001 * 4);
    }
    assert!(publish(&s.host, 0).unwrap_err().to_string().contains("versions only grow"));
    assert!(s.weights(None, 0).is_some(), "a refused version takes nothing away");
}

#[test]
fn a_worker_with_wrong_weights_is_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let wrong = v1::HeldWeights { checksum: held(0).checksum ^ 1, ..held(0) };
    let refused = |e: tonic::Status, code: tonic::Code, words: &[&str]| {
        assert_eq!(e.code(), code, "{e}");
        assert!(words.iter().all(|w| e.message().contains(w)), "{words:?}: {}", e.message());
    };
    let sums = [format!("{:08x}", wrong.checksum), format!("{:08x}", held(0).checksum)];
    let words = ["worker `w`", "version 0", &sums[0], &sums[1], "Fetch them again"];
    let (foreign, damaged) = (tonic::Code::NotFound, tonic::Code::FailedPrecondition);
    // They are another learner's: this one has not sent any. What it has sent was damaged since.
    refused(s.ask("w", 10, Some(wrong)).unwrap_err(), foreign, &words);
    let newer = Some(v1::HeldWeights { version: 7, checksum: 3 });
    refused(s.ask("w", 10, newer).unwrap_err(), foreign, &["not published", "7"]);
    s.weights(None, 0).unwrap();
    refused(s.ask("w", 10, Some(wrong)).unwrap_err(), damaged, &words);
    refused(s.ask("w", 10, newer).unwrap_err(), foreign, &["not published", "7"]);
    let got = s.ask("w", 100, Some(held(0))).unwrap();
    assert_eq!(got.groups.len(), 2, "what was refused took no lease");
    // A group that was made by them is not counted, and another worker gets it at once.
    let bad = v1::SubmitRequest { weights: vec![wrong], ..answer("w", &got.groups[0], 0) };
    refused(s.submit(bad).unwrap_err(), damaged, &words);
    let again = s.lease("v", 1000);
    assert_eq!(again.groups[0].group, got.groups[0].group);
    assert_eq!(s.submit(answer("v", &again.groups[0], 0)).unwrap(), Verdict::Accepted);
    let silent = v1::SubmitRequest { weights: vec![], ..answer("w", &got.groups[1], 0) };
    let e = s.submit(silent).unwrap_err();
    assert!(e.code() == tonic::Code::InvalidArgument && e.message().contains("version 0"), "{e}");
    assert_eq!(s.submit(answer("w", &got.groups[1], 0)).unwrap(), Verdict::Accepted);
    assert_eq!(s.host.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn groups_that_grew_too_old_are_leased_again_and_told() {
    let mut s = serve_with(&["a", "b", "c", "d"], 60.0, 1);
    publish(&s.host, 0).unwrap();
    let (first, ahead) = (s.lease("w", 100), s.lease("w", 100));
    assert_eq!((first.groups.len(), ahead.groups.len()), (2, 2));
    assert!(s.lease("w", 10).groups.is_empty(), "one batch ahead is all");
    for g in first.groups.iter().chain(&ahead.groups) {
        assert_eq!(s.submit(answer("w", g, 0)).unwrap(), Verdict::Accepted);
    }
    let batch = s.host.next_batch(SOON).unwrap().unwrap();
    let ids: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
    s.host.trained(1, &ids).unwrap();
    // Version 1 would train what version 0 made; version 2 does not any more.
    publish(&s.host, 2).unwrap();
    let mut client = s.client.clone();
    let waiting = s.runtime.spawn(async move {
        let ask = v1::LeaseRequest { worker: "v".into(), max_groups: 2, wait_ms: 20_000, ..Default::default() };
        client.lease(ask).await.map(tonic::Response::into_inner)
    });
    assert!(s.host.next_batch(Duration::from_millis(300)).unwrap().is_none());
    let again = s.runtime.block_on(waiting).unwrap().unwrap();
    let keys = |l: &v1::LeaseResponse| l.groups.iter().map(|g| g.group.clone()).collect::<Vec<_>>();
    assert_eq!(keys(&again), keys(&ahead), "what was dropped comes first");
    assert!(again.groups.iter().all(|g| g.min_version == 1));
    let stale = s.host.drain_events().into_iter().filter(|e| matches!(e, Event::Stale { oldest: 0, version: 2, .. }));
    assert_eq!((stale.count(), s.host.stats().stale), (2, 2));
    for g in &again.groups {
        assert_eq!(s.submit(answer("v", g, 2)).unwrap(), Verdict::Accepted);
    }
    assert_eq!(s.host.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn who_looks_ahead_leaves_work_to_those_that_have_none() {
    let mut s = serve_with(&["a", "b", "c", "d"], 60.0, 1);
    publish(&s.host, 0).unwrap();
    assert_eq!(s.lease("w", 100).groups.len(), 2);
    // Another worker is known and has nothing in hand: two of the last two groups are its.
    let got = s.lease("v", 100);
    assert_eq!(got.groups.len(), 2);
    let leases = got.groups.iter().map(|g| g.lease.clone()).collect();
    s.runtime
        .block_on(s.client.release(v1::ReleaseRequest { worker: "v".into(), leases, ..Default::default() }))
        .unwrap();
    assert!(s.lease("w", 50).groups.is_empty());
    assert_eq!(s.lease("v", 100).groups.len(), 2);
}

#[test]
fn groups_of_a_worker_that_is_gone_come_back() {
    let mut s = serve(&["a", "b"], 0.3);
    publish(&s.host, 0).unwrap();
    let lost = s.lease("dead", 100);
    assert_eq!(lost.groups.len(), 2);
    let again = s.lease("alive", 5000);
    assert_eq!(again.groups.len(), 2);
    assert_eq!(s.submit(answer("dead", &lost.groups[0], 0)).unwrap(), Verdict::Expired);
    for g in &again.groups {
        assert_eq!(s.submit(answer("alive", g, 0)).unwrap(), Verdict::Accepted);
    }
    assert_eq!(s.host.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn a_worker_that_was_started_again_gets_its_groups_at_once() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let lost = s.lease("rollout-0#1", 100);
    assert_eq!(lost.groups.len(), 2);
    assert!(s.lease("rollout-1#1", 10).groups.is_empty(), "another worker takes nothing away");
    assert_eq!(s.lease("rollout-0#2", 100).groups.len(), 2);
    assert_eq!(s.submit(answer("rollout-0#1", &lost.groups[0], 0)).unwrap(), Verdict::Expired);
}

#[test]
fn released_groups_are_leased_at_once() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let got = s.lease("w", 100);
    let leases = got.groups.iter().map(|g| g.lease.clone()).collect();
    s.runtime
        .block_on(s.client.release(v1::ReleaseRequest { worker: "w".into(), leases, ..Default::default() }))
        .unwrap();
    assert_eq!(s.lease("v", 100).groups.len(), 2);
}

#[test]
fn a_record_that_cannot_be_prepared_ends_the_wait() {
    let mut s = serve(&["bad"], 60.0);
    publish(&s.host, 0).unwrap();
    let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 2, wait_ms: 100, ..Default::default() };
    let refused = s.runtime.block_on(s.client.lease(ask)).unwrap_err();
    assert!(refused.message().contains("has no image"), "{refused}");
    let e = s.host.next_batch(SOON).unwrap_err().to_string();
    assert!(e.contains("\"bad\" has no image"), "{e}");
}

#[test]
fn a_port_in_use_is_named() {
    let s = serve(&["a", "b"], 60.0);
    let settings = Settings {
        groups_per_step: 2,
        max_staleness: 0,
        lease_s: 1.0,
        stall_s: 300.0,
        silence_s: 1.0,
        seed: 0,
        term: 1,
        total_groups: None,
    };
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
    let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
    let listen = s.host.address().to_string();
    let options =
        HostOptions { listen: listen.clone(), sampling, stop: vec![], vocab: 50, fixed: None, broadcast: None };
    let e = Host::start(s.runtime.handle(), options, machine, Arc::new(Source)).err().map(|e| e.to_string());
    assert!(e.is_some_and(|e| e.contains(&listen) && e.contains("in use")));
}

#[test]
fn workers_hear_that_the_run_is_over() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    s.lease("w", 10);
    let mut client = s.client.clone();
    let waiting = s.runtime.spawn(async move {
        let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 1, wait_ms: 20_000, ..Default::default() };
        client.lease(ask).await.map(|a| a.into_inner().finished)
    });
    std::thread::sleep(Duration::from_millis(50));
    let started = std::time::Instant::now();
    s.host.finish(SOON);
    assert!(s.runtime.block_on(waiting).unwrap().unwrap());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

/// What a dead worker holds goes to others long before its lease runs out; a sign of life keeps it.
#[test]
fn a_worker_that_falls_silent_loses_its_groups() {
    let mut s = serve_while_heard(&["a", "b"], 600.0, 0, 1.5);
    publish(&s.host, 0).unwrap();
    assert_eq!(s.lease("one", 0).groups.len(), 2);
    for _ in 0..8 {
        let life = v1::HeartbeatRequest { worker: "one".into(), ..Default::default() };
        let answer = s.runtime.block_on(s.client.heartbeat(life)).unwrap().into_inner();
        assert!(answer.lost.is_empty());
        assert!(s.lease("two", 300).groups.is_empty(), "worker one lives");
    }
    let begun = std::time::Instant::now();
    assert_eq!(s.lease("two", 10_000).groups.len(), 2);
    assert!(begun.elapsed() < std::time::Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[test]
fn the_service_is_ready_when_weights_are_published_and_not_before() {
    let s = serve(&["a", "b"], 60.0);
    let address = s.host.address().to_string();
    let asked = |name: &str| s.runtime.block_on(unveil_service::check_health(&address, name, SOON)).unwrap();
    assert!(asked("") && !asked("unveil.v1.Experience"), "alive, and nothing to lease");
    publish(&s.host, 0).unwrap();
    assert!(asked("") && asked("unveil.v1.Experience"));
    publish(&s.host, 1).unwrap();
    assert!(asked("unveil.v1.Experience"), "new weights do not take it away");
}

/// Reads on to the end of a stream and returns how it ends.
fn ending(s: &Served, mut stream: tonic::Streaming<v1::WeightsChunk>) -> Result<(), tonic::Status> {
    s.runtime.block_on(async {
        while stream.message().await?.is_some() {}
        Ok(())
    })
}

#[test]
fn readers_of_weights_that_are_too_slow_are_dropped_and_may_ask_again() {
    let mut s = serve(&["a", "b"], 60.0);
    // More than what may be under way unread.
    let named = |v: u64| vec![("w".to_owned(), Tensor::full([24 << 20], v as f64, (Kind::Float, Device::Cpu)))];
    let publish = |s: &Served, version: u64| {
        let named = named(version);
        let new = NewWeights { version, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true };
        s.host.publish(&new).unwrap();
    };
    let mut readers = Vec::new();
    for version in 0..3 {
        publish(&s, version);
        let ask = v1::WeightsRequest { worker: format!("w{version}"), holds: None, wait_ms: 0, joins: None };
        let mut client = s.client.clone();
        readers.push(s.runtime.block_on(async {
            let mut stream = client.weights(ask).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
            stream
        }));
    }
    let ends: Vec<_> = readers.into_iter().map(|r| ending(&s, r)).collect();
    let dropped = ends[0].as_ref().unwrap_err();
    assert_eq!(dropped.code(), tonic::Code::Aborted);
    assert!(dropped.message().contains("version 0 is superseded"), "{dropped:?}");
    assert!(ends[1].is_ok() && ends[2].is_ok(), "one version behind is still whole: {ends:?}");
    let (head, data) = s.weights(None, 0).unwrap();
    assert_eq!((head.version, data.len()), (2, 24 << 22));
}
