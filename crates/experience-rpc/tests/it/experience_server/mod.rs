//! The experience server over real gRPC: leases, accounting, refusals, and weight streams.

mod refused;

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use unveil_core::{Finish, GroupId, Response, TrainGroup};
use unveil_experience::{Event, Experience, Settings};
use unveil_experience_rpc::{
    ExperienceServer, ExperienceServerOptions, GroupSource, NewWeights, PreparedGroup, RecordFailure, ServerError,
};
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::v1::submit_response::Verdict;
use unveil_proto::{breakdown_to_wire, response_to_wire, v1};
use unveil_testkit_model::{breakdown, experience_settings, server_options, text_input};

struct Source;

impl GroupSource for Source {
    fn prepare(&self, index: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        if group.record == "bad" {
            return Err("record \"bad\" has no image".into());
        }
        let input = text_input(&group.record, index);
        Ok(PreparedGroup { input: Arc::new(input), image: vec![index as u8; 3].into(), image_hash: "h".into() })
    }
}

struct TestServer {
    runtime: Runtime,
    server: ExperienceServer,
    client: ExperienceClient<Channel>,
}

fn serve(ids: &[&str], lease_s: f64) -> TestServer {
    serve_with_staleness(ids, lease_s, 0)
}

fn serve_with_staleness(ids: &[&str], lease_s: f64, max_staleness: u64) -> TestServer {
    serve_with_silence(ids, lease_s, max_staleness, lease_s)
}

fn serve_with_silence(ids: &[&str], lease_s: f64, max_staleness: u64, silence_s: f64) -> TestServer {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let settings = Settings { max_staleness, silence_s, total_groups: Some(4), ..experience_settings(2, lease_s) };
    let ids = ids.iter().map(|s| (*s).to_owned()).collect();
    let machine: Experience<TrainGroup> = Experience::new(settings, ids).unwrap();
    let server = ExperienceServer::start(runtime.handle(), server_options(), machine, Arc::new(Source)).unwrap();
    let address = server.address().to_string();
    let channel = runtime.block_on(unveil_service::connect(&address, Duration::from_secs(5))).unwrap();
    TestServer { client: ExperienceClient::new(channel), server, runtime }
}

impl TestServer {
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

    /// Fetches header and data for a worker that holds `holds` and verifies every chunk; `None` if there are no newer
    /// weights.
    fn weights(&mut self, holds: Option<v1::HeldWeights>, wait_ms: u32) -> Option<(v1::WeightsHead, Vec<u8>)> {
        let ask = v1::WeightsRequest { worker: "w".into(), holds, wait_ms, broadcast_capability: None };
        self.runtime.block_on(async {
            let mut stream = self.client.weights(ask).await.unwrap().into_inner();
            let mut chunks = Vec::new();
            while let Some(chunk) = stream.message().await.unwrap() {
                unveil_experience_rpc::checksum::verify(&chunk).unwrap();
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

/// Computes the weights of a version: one constant tensor and one that changes.
fn named(version: u64) -> Vec<(String, Tensor)> {
    let options = (Kind::Float, Device::Cpu);
    vec![
        ("base".into(), Tensor::arange(400_000, options)),
        ("top".into(), Tensor::full([300_001], version as f64 + 0.5, options)),
    ]
}

fn bytes(named: &[(String, Tensor)]) -> Vec<u8> {
    let tensor_bytes =
        |t: &Tensor| Vec::<f32>::try_from(t).unwrap().into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    named.iter().flat_map(|(_, t)| tensor_bytes(t)).collect()
}

fn held(version: u64) -> v1::HeldWeights {
    v1::HeldWeights { version, checksum: unveil_experience_rpc::checksum::Checksum::of(&bytes(&named(version))).crc32c }
}

fn publish(server: &ExperienceServer, version: u64) -> Result<(), ServerError> {
    let named = named(version);
    server.publish(&NewWeights {
        version,
        named: &named,
        kind: Kind::Float,
        adapters: None,
        may_change: &|name| name == "top",
    })
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn batches_are_completed_and_counted_once() {
    let mut s = serve(&["a", "b", "c", "d"], 60.0);
    assert!(s.lease("w", 50).groups.is_empty(), "nothing before the first weights");
    publish(&s.server, 0).unwrap();
    let leased = s.lease("w", 1000);
    assert_eq!((leased.groups.len(), leased.version, leased.finished), (2, 0, false));
    let sampling = leased.groups[0].sampling.unwrap();
    assert_eq!((sampling.n, sampling.max_new_tokens, sampling.seed), (2, 4, 7));
    assert!(leased.groups[0].record_json.contains("\"boxes\"") && leased.groups[0].image.len() == 3);
    assert!(s.lease("other", 50).groups.is_empty(), "strictly on-policy: no more than one batch");
    assert_eq!(s.submit(answer("w", &leased.groups[0], 0)).unwrap(), Verdict::Accepted);
    assert_eq!(s.submit(answer("w", &leased.groups[0], 0)).unwrap(), Verdict::Duplicate);
    assert!(s.server.next_batch(Duration::from_millis(20)).unwrap().is_none());
    assert_eq!(s.submit(answer("thief", &leased.groups[1], 0)).unwrap(), Verdict::Expired);
    assert_eq!(s.submit(answer("w", &leased.groups[1], 0)).unwrap(), Verdict::Accepted);
    let batch = s.server.next_batch(SOON).unwrap().unwrap();
    assert_eq!((batch.len(), batch[0].spans[0][1], batch[0].totals()), (2, (1, 2), vec![Some(0.5); 2]));
    assert_eq!(batch[0].input.record.id, batch[0].id.record);
    let ids: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
    s.server.mark_trained(1, &ids).unwrap();
    assert_eq!(s.submit(answer("w", &leased.groups[0], 0)).unwrap(), Verdict::Duplicate);
    publish(&s.server, 1).unwrap();
    let next = s.lease("w", 1000);
    assert_eq!((next.version, next.groups[0].min_version), (1, 1));
    assert_eq!(s.submit(answer("w", &next.groups[0], 0)).unwrap(), Verdict::Stale);
    assert_eq!(s.server.snapshot().trained, 2);
}

#[test]
fn weight_streams_contain_only_changed_tensors() {
    let mut s = serve(&["a", "b"], 60.0);
    let ask = v1::WeightsRequest { worker: "w".into(), holds: None, wait_ms: 10, broadcast_capability: None };
    let none = s.runtime.block_on(s.client.weights(ask));
    assert_eq!(none.err().map(|e| e.code()), Some(tonic::Code::Unavailable));
    publish(&s.server, 0).unwrap();
    let (head, data) = s.weights(None, 0).unwrap();
    assert_eq!((head.version, head.checksum, head.base), (0, held(0).checksum, None));
    assert!(data == bytes(&named(0)));
    assert_eq!(s.weights(Some(held(0)), 10), None, "the worker has the newest");
    // The worker asks before a newer version exists, and then receives only the changed tensor.
    let mut client = s.client.clone();
    let holds = Some(held(0));
    let ask = v1::WeightsRequest { worker: "w".into(), holds, wait_ms: 20_000, broadcast_capability: None };
    let waiting = s.runtime.spawn(async move {
        let mut stream = client.weights(ask).await.unwrap().into_inner();
        let first = stream.message().await.unwrap().unwrap();
        prost::Message::decode(first.data).map(|head: v1::WeightsHead| (head.version, head.base))
    });
    std::thread::sleep(Duration::from_millis(50));
    publish(&s.server, 1).unwrap();
    assert_eq!(s.runtime.block_on(waiting).unwrap().unwrap(), (1, Some(held(0))));
    let (head, data) = s.weights(Some(held(0)), 0).unwrap();
    assert_eq!((head.version, head.checksum, head.base), (1, held(1).checksum, Some(held(0))));
    assert_eq!(head.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["top"]);
    assert!(data == bytes(&named(1)[1..]));
    // Damaged weights, or those of another learner, cannot serve as a base.
    for strange in [v1::HeldWeights { version: 9, checksum: 1 }, v1::HeldWeights { checksum: 1, ..held(0) }] {
        assert_eq!(s.weights(Some(strange), 0).unwrap().1.len(), 700_001 * 4);
    }
    assert!(publish(&s.server, 0).unwrap_err().to_string().contains("versions must not decrease"));
    assert!(s.weights(None, 0).is_some(), "a refused version does not withdraw the weights");
}

#[test]
fn workers_with_wrong_weights_are_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let wrong = v1::HeldWeights { checksum: held(0).checksum ^ 1, ..held(0) };
    let refused = |e: tonic::Status, code: tonic::Code, words: &[&str]| {
        assert_eq!(e.code(), code, "{e}");
        assert!(words.iter().all(|w| e.message().contains(w)), "{words:?}: {}", e.message());
    };
    let sums = [format!("{:08x}", wrong.checksum), format!("{:08x}", held(0).checksum)];
    let words = ["worker `w`", "version 0", &sums[0], &sums[1], "Fetch them again"];
    let foreign = tonic::Code::NotFound;
    let damaged = tonic::Code::FailedPrecondition;
    // This learner has not sent any weights, so they come from another one; once it has sent them, they were damaged.
    refused(s.ask("w", 10, Some(wrong)).unwrap_err(), foreign, &words);
    let newer = Some(v1::HeldWeights { version: 7, checksum: 3 });
    refused(s.ask("w", 10, newer).unwrap_err(), foreign, &["not published", "7"]);
    s.weights(None, 0).unwrap();
    refused(s.ask("w", 10, Some(wrong)).unwrap_err(), damaged, &words);
    refused(s.ask("w", 10, newer).unwrap_err(), foreign, &["not published", "7"]);
    let leased = s.ask("w", 100, Some(held(0))).unwrap();
    assert_eq!(leased.groups.len(), 2, "refused calls took no leases");
    // A group generated by them is not counted and can be leased immediately.
    let tampered = v1::SubmitRequest { weights: vec![wrong], ..answer("w", &leased.groups[0], 0) };
    refused(s.submit(tampered).unwrap_err(), damaged, &words);
    let again = s.lease("v", 1000);
    assert_eq!(again.groups[0].group, leased.groups[0].group);
    assert_eq!(s.submit(answer("v", &again.groups[0], 0)).unwrap(), Verdict::Accepted);
    let silent = v1::SubmitRequest { weights: vec![], ..answer("w", &leased.groups[1], 0) };
    let e = s.submit(silent).unwrap_err();
    assert!(e.code() == tonic::Code::InvalidArgument && e.message().contains("version 0"), "{e}");
    assert_eq!(s.submit(answer("w", &leased.groups[1], 0)).unwrap(), Verdict::Accepted);
    assert_eq!(s.server.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn stale_groups_are_leased_again() {
    let mut s = serve_with_staleness(&["a", "b", "c", "d"], 60.0, 1);
    publish(&s.server, 0).unwrap();
    let first = s.lease("w", 100);
    let ahead = s.lease("w", 100);
    assert_eq!((first.groups.len(), ahead.groups.len()), (2, 2));
    assert!(s.lease("w", 10).groups.is_empty(), "at most one batch ahead");
    for g in first.groups.iter().chain(&ahead.groups) {
        assert_eq!(s.submit(answer("w", g, 0)).unwrap(), Verdict::Accepted);
    }
    let batch = s.server.next_batch(SOON).unwrap().unwrap();
    let ids: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
    s.server.mark_trained(1, &ids).unwrap();
    // Groups of version 0 can be trained at version 1, but not at version 2.
    publish(&s.server, 2).unwrap();
    let mut client = s.client.clone();
    let waiting = s.runtime.spawn(async move {
        let ask = v1::LeaseRequest { worker: "v".into(), max_groups: 2, wait_ms: 20_000, ..Default::default() };
        client.lease(ask).await.map(tonic::Response::into_inner)
    });
    assert!(s.server.next_batch(Duration::from_millis(300)).unwrap().is_none());
    let again = s.runtime.block_on(waiting).unwrap().unwrap();
    let keys = |l: &v1::LeaseResponse| l.groups.iter().map(|g| g.group.clone()).collect::<Vec<_>>();
    assert_eq!(keys(&again), keys(&ahead), "stale groups come first");
    assert!(again.groups.iter().all(|g| g.min_version == 1));
    let stale = s.server.drain_events().into_iter().filter(|e| matches!(e, Event::Stale { oldest: 0, version: 2, .. }));
    assert_eq!((stale.count(), s.server.stats().stale), (2, 2));
    for g in &again.groups {
        assert_eq!(s.submit(answer("v", g, 2)).unwrap(), Verdict::Accepted);
    }
    assert_eq!(s.server.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn prefetching_workers_leave_groups_to_idle_ones() {
    let mut s = serve_with_staleness(&["a", "b", "c", "d"], 60.0, 1);
    publish(&s.server, 0).unwrap();
    assert_eq!(s.lease("w", 100).groups.len(), 2);
    // Another worker is idle, so the last two groups are reserved for it.
    let leased = s.lease("v", 100);
    assert_eq!(leased.groups.len(), 2);
    let leases = leased.groups.iter().map(|g| g.lease.clone()).collect();
    s.runtime
        .block_on(s.client.release(v1::ReleaseRequest { worker: "v".into(), leases, ..Default::default() }))
        .unwrap();
    assert!(s.lease("w", 50).groups.is_empty());
    assert_eq!(s.lease("v", 100).groups.len(), 2);
}

#[test]
fn groups_of_a_lost_worker_return() {
    let mut s = serve(&["a", "b"], 0.3);
    publish(&s.server, 0).unwrap();
    let lost = s.lease("dead", 100);
    assert_eq!(lost.groups.len(), 2);
    let again = s.lease("alive", 5000);
    assert_eq!(again.groups.len(), 2);
    assert_eq!(s.submit(answer("dead", &lost.groups[0], 0)).unwrap(), Verdict::Expired);
    for g in &again.groups {
        assert_eq!(s.submit(answer("alive", g, 0)).unwrap(), Verdict::Accepted);
    }
    assert_eq!(s.server.next_batch(SOON).unwrap().map(|b| b.len()), Some(2));
}

#[test]
fn restarted_worker_gets_its_groups_immediately() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let lost = s.lease("rollout-0#1", 100);
    assert_eq!(lost.groups.len(), 2);
    assert!(s.lease("rollout-1#1", 10).groups.is_empty(), "another worker does not free the groups");
    assert_eq!(s.lease("rollout-0#2", 100).groups.len(), 2);
    assert_eq!(s.submit(answer("rollout-0#1", &lost.groups[0], 0)).unwrap(), Verdict::Expired);
}

#[test]
fn released_groups_are_leased_immediately() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let leased = s.lease("w", 100);
    let leases = leased.groups.iter().map(|g| g.lease.clone()).collect();
    s.runtime
        .block_on(s.client.release(v1::ReleaseRequest { worker: "w".into(), leases, ..Default::default() }))
        .unwrap();
    assert_eq!(s.lease("v", 100).groups.len(), 2);
}

#[test]
fn a_preparation_error_ends_the_wait() {
    let mut s = serve(&["bad"], 60.0);
    publish(&s.server, 0).unwrap();
    let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 2, wait_ms: 100, ..Default::default() };
    let refused = s.runtime.block_on(s.client.lease(ask)).unwrap_err();
    assert!(refused.message().contains("has no image"), "{refused}");
    let e = s.server.next_batch(SOON).unwrap_err().to_string();
    assert!(e.contains("\"bad\" has no image"), "{e}");
}

#[test]
fn port_in_use_is_named() {
    let s = serve(&["a", "b"], 60.0);
    let settings = experience_settings(2, 1.0);
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
    let listen = s.server.address().to_string();
    let options = ExperienceServerOptions { listen: listen.clone(), ..server_options() };
    let e =
        ExperienceServer::start(s.runtime.handle(), options, machine, Arc::new(Source)).err().map(|e| e.to_string());
    assert!(e.is_some_and(|e| e.contains(&listen) && e.contains("in use")));
}

#[test]
fn workers_are_notified_of_the_end() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    s.lease("w", 10);
    let mut client = s.client.clone();
    let waiting = s.runtime.spawn(async move {
        let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 1, wait_ms: 20_000, ..Default::default() };
        client.lease(ask).await.map(|a| a.into_inner().finished)
    });
    std::thread::sleep(Duration::from_millis(50));
    let started = std::time::Instant::now();
    s.server.finish(SOON);
    assert!(s.runtime.block_on(waiting).unwrap().unwrap());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

/// Groups of a silent worker return long before its leases expire; heartbeats keep them.
#[test]
fn silent_worker_loses_its_groups() {
    let mut s = serve_with_silence(&["a", "b"], 600.0, 0, 1.5);
    publish(&s.server, 0).unwrap();
    assert_eq!(s.lease("one", 0).groups.len(), 2);
    for _ in 0..8 {
        let life = v1::HeartbeatRequest { worker: "one".into(), ..Default::default() };
        let answer = s.runtime.block_on(s.client.heartbeat(life)).unwrap().into_inner();
        assert!(answer.lost.is_empty());
        assert!(s.lease("two", 300).groups.is_empty(), "worker one is alive");
    }
    let start = std::time::Instant::now();
    assert_eq!(s.lease("two", 10_000).groups.len(), 2);
    assert!(start.elapsed() < std::time::Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn service_is_ready_after_the_first_weights() {
    let s = serve(&["a", "b"], 60.0);
    let address = s.server.address().to_string();
    let asked = |name: &str| s.runtime.block_on(unveil_service::check_health(&address, name, SOON)).unwrap();
    assert!(asked("") && !asked("unveil.v1.Experience"), "alive but not ready");
    publish(&s.server, 0).unwrap();
    assert!(asked("") && asked("unveil.v1.Experience"));
    publish(&s.server, 1).unwrap();
    assert!(asked("unveil.v1.Experience"), "new weights keep it ready");
}

/// Reads a stream to its end and returns its status.
fn read_to_end(s: &TestServer, mut stream: tonic::Streaming<v1::WeightsChunk>) -> Result<(), tonic::Status> {
    s.runtime.block_on(async {
        while stream.message().await?.is_some() {}
        Ok(())
    })
}

#[test]
fn slow_readers_of_weights_are_dropped() {
    let mut s = serve(&["a", "b"], 60.0);
    // More than the transport buffers.
    let named = |v: u64| vec![("w".to_owned(), Tensor::full([24 << 20], v as f64, (Kind::Float, Device::Cpu)))];
    let publish = |s: &TestServer, version: u64| {
        let named = named(version);
        let new = NewWeights { version, named: &named, kind: Kind::Float, adapters: None, may_change: &|_| true };
        s.server.publish(&new).unwrap();
    };
    let mut readers = Vec::new();
    for version in 0..3 {
        publish(&s, version);
        let ask =
            v1::WeightsRequest { worker: format!("w{version}"), holds: None, wait_ms: 0, broadcast_capability: None };
        let mut client = s.client.clone();
        readers.push(s.runtime.block_on(async {
            let mut stream = client.weights(ask).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
            stream
        }));
    }
    let ends: Vec<_> = readers.into_iter().map(|r| read_to_end(&s, r)).collect();
    let dropped = ends[0].as_ref().unwrap_err();
    assert_eq!(dropped.code(), tonic::Code::Aborted);
    assert!(dropped.message().contains("version 0 is superseded"), "{dropped:?}");
    assert!(ends[1].is_ok() && ends[2].is_ok(), "one version behind is still complete: {ends:?}");
    let (head, data) = s.weights(None, 0).unwrap();
    assert_eq!((head.version, data.len()), (2, 24 << 22));
}
