//! Who the experience service lets in, and what it takes of them: certificates, the token, bounds of messages.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::record;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::Code;
use unveil_config::{Config, Role};
use unveil_core::{Grid, GroupId, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{GroupInput, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, TrainGroup};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_rollout::sync::WeightReceiver;
use unveil_service::issue::{Existing, IssueOptions, issue};
use unveil_service::{Access, authorised, client_options, connect_with, limited};

const SOON: Duration = Duration::from_secs(2);

struct Source;

impl LeaseSource for Source {
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased, LearnerError> {
        let input = GroupInput {
            record: record(&group.record),
            image_size: (64, 64),
            prompt: unveil_model::Prompt { tokens: vec![1, index as u32], grids: vec![] },
            patches: vec![],
            merged: Grid { rows: 2, cols: 2 },
            encoded: Default::default(),
        };
        Ok(Leased { input: Arc::new(input), image: vec![0; 3].into(), image_hash: "h".into() })
    }
}

fn host(runtime: &Runtime, listen: &str, c: &Config) -> Result<Host, LearnerError> {
    let settings = Settings {
        groups_per_step: 2,
        max_staleness: 0,
        lease_s: 60.0,
        stall_s: 300.0,
        silence_s: 60.0,
        seed: 0,
        term: 1,
        total_groups: Some(4),
    };
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into(), "b".into()]).unwrap();
    let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
    let options =
        HostOptions { listen: listen.into(), sampling, stop: vec![], vocab: 50, fixed: None, broadcast: None };
    let access = Access::of(c, Role::Learner)?;
    let host = Host::start_with(runtime.handle(), options, access, machine, Arc::new(Source))?;
    let named = vec![("w".to_owned(), Tensor::ones([5], (Kind::Float, Device::Cpu)))];
    host.publish(&NewWeights { version: 0, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true })?;
    Ok(host)
}

#[test]
fn the_experience_service_knows_its_callers() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let tls = |name: &str| {
        let at = dir.path().join(name);
        issue(&at, &IssueOptions { hosts: vec![], days: 1, existing: Existing::Refuse }).unwrap();
        at.display().to_string()
    };
    let token = |text: &str| {
        let at = dir.path().join(text);
        std::fs::write(&at, text).unwrap();
        at.display().to_string()
    };
    let mut c = Config::default();
    (c.tls.dir, c.auth.token_file) = (tls("ours"), token("the token of this run"));
    let with = |change: &dyn Fn(&mut Config)| {
        let mut other = c.clone();
        change(&mut other);
        other
    };
    // What others reach needs TLS, and callers that are known.
    let plain = with(&|c| c.tls.dir.clear());
    for (refused, why) in [
        (plain.clone(), "tls.dir"),
        (
            with(&|c| {
                c.tls.mutual = false;
                c.auth.token_file.clear()
            }),
            "auth.token_env",
        ),
    ] {
        let e = host(&runtime, "0.0.0.0:0", &refused).err().unwrap().to_string();
        assert!(e.contains("0.0.0.0") && e.contains(why), "{e}");
    }
    let host = host(&runtime, "0.0.0.0:0", &c).unwrap();
    let address = format!("localhost:{}", host.address().port());
    let fetch = |c: &Config| {
        let options = client_options(c, Role::Rollout).unwrap();
        runtime.block_on(async {
            let mut receiver = WeightReceiver::connect_with(&address, "w", &options, SOON).await?;
            receiver.fetch(Duration::ZERO).await
        })
    };
    assert_eq!(fetch(&c).unwrap().map(|u| u.version), Some(0));
    let strangers = [
        (with(&|c| c.auth.token_file = token("the token of another run")), "Unauthenticated"),
        (with(&|c| c.auth.token_file.clear()), "Unauthenticated"),
        (with(&|c| c.tls.dir = tls("theirs")), "certificate"),
        (with(&|c| c.tls.mutual = false), ""),
        (plain, ""),
    ];
    for (stranger, why) in strangers {
        let e = fetch(&stranger).err().unwrap().to_string();
        assert!(e.contains(&address) && e.contains(why) && !e.contains("token of"), "{e}");
    }

    // So is who shows a certificate of ours that is another role's.
    let options = client_options(&c, Role::Client).unwrap();
    let fetched = runtime.block_on(async {
        let mut receiver = WeightReceiver::connect_with(&address, "w", &options, SOON).await?;
        receiver.fetch(Duration::ZERO).await
    });
    let e = fetched.err().unwrap().to_string();
    assert!(e.contains("may call the learner service"), "{e}");

    // One of ours that sends too much is refused too, and the others are served on.
    let options = client_options(&c, Role::Rollout).unwrap();
    let channel = runtime.block_on(connect_with(&address, &options, SOON)).unwrap();
    let mut client = limited!(ExperienceClient::new(channel), 1 << 30);
    let mut submit = |r: v1::SubmitRequest| {
        let request = authorised(tonic::Request::new(r), options.token.as_ref()).unwrap();
        runtime
            .block_on(client.submit(request))
            .map(|a| a.into_inner().verdict())
            .map_err(|e| (e.code(), e.message().to_owned()))
    };
    let group = Some(v1::GroupKey { record: "a".into(), ..Default::default() });
    let good = v1::SubmitRequest { worker: "w".into(), lease: "1-1".into(), group, ..Default::default() };
    let large = v1::Response { text: "x".repeat(65 << 20), ..Default::default() };
    let e = submit(v1::SubmitRequest { responses: vec![large], ..good.clone() }).unwrap_err();
    assert!(matches!(e.0, Code::OutOfRange | Code::ResourceExhausted), "{e:?}");
    let e = submit(v1::SubmitRequest { worker: "x".repeat(1000), ..good.clone() }).unwrap_err();
    assert!(e.0 == Code::InvalidArgument && e.1.starts_with("`worker` "), "{e:?}");
    let e = submit(good).unwrap_err();
    assert!(
        e.0 == Code::InvalidArgument && e.1.contains("0 responses"),
        "the bounds hold, what is missing is told: {e:?}"
    );
    assert!(fetch(&c).unwrap().is_some());
}
