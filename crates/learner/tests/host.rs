//! The experience host over real gRPC: what is leased, counted, refused, reclaimed, and how weights travel.

mod common;
#[path = "common/stage.rs"]
mod stage;

use std::sync::Arc;
use std::time::Duration;

use common::{breakdown, record};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use unveil_core::{Finish, Grid, GroupId, Response, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{GroupInput, Host, HostOptions, LearnerError, LeaseSource, Leased, TrainGroup};
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
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let settings = Settings { groups_per_step: 2, max_staleness: 0, lease_s, seed: 0, term: 1, total_groups: Some(4) };
    let ids = ids.iter().map(|s| (*s).to_owned()).collect();
    let machine: Experience<TrainGroup> = Experience::new(settings, ids).unwrap();
    let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
    let options = HostOptions { listen: "127.0.0.1:0".into(), sampling, stop: vec![], vocab: 50 };
    let host = Host::start(runtime.handle(), options, machine, Arc::new(Source)).unwrap();
    let address = host.address().to_string();
    let channel = runtime.block_on(unveil_service::connect(&address, Duration::from_secs(5))).unwrap();
    Served { client: ExperienceClient::new(channel), host, runtime }
}

impl Served {
    fn lease(&mut self, worker: &str, wait_ms: u32) -> v1::LeaseResponse {
        let ask = v1::LeaseRequest { worker: worker.into(), max_groups: 2, wait_ms };
        self.runtime.block_on(self.client.lease(ask)).unwrap().into_inner()
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
    }
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_batch_comes_together_and_counts_once() {
    let mut s = serve(&["a", "b", "c", "d"], 60.0);
    assert!(s.lease("w", 50).groups.is_empty(), "nothing before the first weights");
    s.host.publish(0, vec![1; 10]).unwrap();
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
    s.host.publish(1, vec![2; 10]).unwrap();
    let next = s.lease("w", 1000);
    assert_eq!((next.version, next.groups[0].min_version), (1, 1));
    assert_eq!(s.submit(answer("w", &next.groups[0], 0)).unwrap(), Verdict::Stale);
    assert_eq!(s.host.snapshot().trained, 2);
}

#[test]
fn weights_travel_in_checked_chunks() {
    let mut s = serve(&["a", "b"], 60.0);
    let none = s.runtime.block_on(s.client.weights(v1::WeightsRequest { worker: "w".into(), have_version: None }));
    assert_eq!(none.err().map(|e| e.code()), Some(tonic::Code::Unavailable));
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    s.host.publish(0, bytes.clone()).unwrap();
    let (version, found) = s.runtime.block_on(stage::weights(&mut s.client, None));
    assert_eq!((version, found == bytes), (0, true));
    assert!(s.runtime.block_on(stage::weights(&mut s.client, Some(0))).1.is_empty());
    // A worker that outlived an older learner has a version that is not this one's, older or newer.
    assert_eq!(s.runtime.block_on(stage::weights(&mut s.client, Some(9))).1.len(), bytes.len());
}

#[test]
fn groups_of_a_worker_that_is_gone_come_back() {
    let mut s = serve(&["a", "b"], 0.3);
    s.host.publish(0, vec![0]).unwrap();
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
    s.host.publish(0, vec![0]).unwrap();
    let lost = s.lease("rollout-0#1", 100);
    assert_eq!(lost.groups.len(), 2);
    assert!(s.lease("rollout-1#1", 10).groups.is_empty(), "another worker takes nothing away");
    assert_eq!(s.lease("rollout-0#2", 100).groups.len(), 2);
    assert_eq!(s.submit(answer("rollout-0#1", &lost.groups[0], 0)).unwrap(), Verdict::Expired);
}

#[test]
fn released_groups_are_leased_at_once() {
    let mut s = serve(&["a", "b"], 60.0);
    s.host.publish(0, vec![0]).unwrap();
    let got = s.lease("w", 100);
    let leases = got.groups.iter().map(|g| g.lease.clone()).collect();
    s.runtime.block_on(s.client.release(v1::ReleaseRequest { worker: "w".into(), leases })).unwrap();
    assert_eq!(s.lease("v", 100).groups.len(), 2);
}

#[test]
fn what_does_not_hold_together_is_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    s.host.publish(0, vec![0]).unwrap();
    let got = s.lease("w", 100);
    let mut refuse = |change: &dyn Fn(&mut v1::SubmitRequest)| {
        let mut r = answer("w", &got.groups[0], 0);
        change(&mut r);
        s.submit(r).err().map(|e| (e.code(), e.message().to_owned())).unwrap_or((tonic::Code::Ok, String::new()))
    };
    let invalid = tonic::Code::InvalidArgument;
    for (change, word) in [
        (&(|r: &mut v1::SubmitRequest| r.group = None) as &dyn Fn(&mut v1::SubmitRequest), "group"),
        (&|r| r.responses.truncate(1), "1 responses"),
        (&|r| r.responses[0].logprobs.truncate(1), "logprobs"),
        (&|r| r.responses[1].tokens[0] = 50, "vocabulary of 50"),
        (&|r| r.responses[1].index = 0, "another index"),
        (&|r| r.responses[0].spans.truncate(1), "1 spans for 2 tokens"),
        (&|r| (r.responses[0].tokens, r.responses[0].spans) = (vec![1; 5], vec![]), "more than it may"),
    ] {
        let (code, message) = refuse(change);
        assert!(code == invalid && message.contains(word), "{word}: {code:?} {message}");
    }
    assert_eq!(s.submit(answer("w", &got.groups[0], 0)).unwrap(), Verdict::Accepted);
}

#[test]
fn a_record_that_cannot_be_prepared_ends_the_wait() {
    let mut s = serve(&["bad"], 60.0);
    s.host.publish(0, vec![0]).unwrap();
    let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 2, wait_ms: 100 };
    let refused = s.runtime.block_on(s.client.lease(ask)).unwrap_err();
    assert!(refused.message().contains("has no image"), "{refused}");
    let e = s.host.next_batch(SOON).unwrap_err().to_string();
    assert!(e.contains("\"bad\" has no image"), "{e}");
}

#[test]
fn a_port_in_use_is_named() {
    let s = serve(&["a", "b"], 60.0);
    let settings =
        Settings { groups_per_step: 2, max_staleness: 0, lease_s: 1.0, seed: 0, term: 1, total_groups: None };
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
    let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
    let listen = s.host.address().to_string();
    let options = HostOptions { listen: listen.clone(), sampling, stop: vec![], vocab: 50 };
    let e = Host::start(s.runtime.handle(), options, machine, Arc::new(Source)).err().map(|e| e.to_string());
    assert!(e.is_some_and(|e| e.contains(&listen) && e.contains("in use")));
}

#[test]
fn workers_hear_that_the_run_is_over() {
    let mut s = serve(&["a", "b"], 60.0);
    s.host.publish(0, vec![0]).unwrap();
    s.lease("w", 10);
    let mut client = s.client.clone();
    let waiting = s.runtime.spawn(async move {
        let ask = v1::LeaseRequest { worker: "w".into(), max_groups: 1, wait_ms: 20_000 };
        client.lease(ask).await.map(|a| a.into_inner().finished)
    });
    std::thread::sleep(Duration::from_millis(50));
    let started = std::time::Instant::now();
    s.host.finish(SOON);
    assert!(s.runtime.block_on(waiting).unwrap().unwrap());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}
