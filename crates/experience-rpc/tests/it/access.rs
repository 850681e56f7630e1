//! Access to the experience service: certificates, token, and limits of messages.

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::Code;
use unveil_config::{Config, Role};
use unveil_core::{GroupId, TrainGroup};
use unveil_experience::{Experience, Settings};
use unveil_experience_rpc::{
    ExperienceServer, ExperienceServerOptions, GroupSource, NewWeights, PreparedGroup, RecordFailure, ServerError,
    WeightReceiver,
};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::issue::{Existing, IssueOptions, issue};
use unveil_service::{ServiceAccess, authorize, client_options, connect_with, limited};
use unveil_testkit_model::{experience_settings, server_options, text_input};

const SOON: Duration = Duration::from_secs(2);

struct Source;

impl GroupSource for Source {
    fn prepare(&self, index: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        let input = text_input(&group.record, index);
        Ok(PreparedGroup { input: Arc::new(input), image: vec![0; 3].into(), image_hash: "h".into() })
    }
}

fn start_server(runtime: &Runtime, listen: &str, c: &Config) -> Result<ExperienceServer, ServerError> {
    let settings = Settings { total_groups: Some(4), ..experience_settings(2, 60.0) };
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into(), "b".into()]).unwrap();
    let options = ExperienceServerOptions { listen: listen.into(), ..server_options() };
    let access = ServiceAccess::of(c, Role::Learner)?;
    let server = ExperienceServer::start_with_access(runtime.handle(), options, access, machine, Arc::new(Source))?;
    let named = vec![("w".to_owned(), Tensor::ones([5], (Kind::Float, Device::Cpu)))];
    server.publish(&NewWeights {
        version: 0,
        named: &named,
        kind: Kind::Float,
        adapters: None,
        may_change: &|_| true,
    })?;
    Ok(server)
}

#[test]
fn experience_service_authenticates_and_limits_callers() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let tls = |name: &str| {
        let path = dir.path().join(name);
        issue(&path, &IssueOptions { hosts: vec![], days: 1, existing: Existing::Refuse }).unwrap();
        path.display().to_string()
    };
    let token = |text: &str| {
        let path = dir.path().join(text);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let mut c = Config::default();
    c.tls.dir = tls("ours");
    c.auth.token_file = token("the token of this run");
    let with = |change: &dyn Fn(&mut Config)| {
        let mut other = c.clone();
        change(&mut other);
        other
    };
    // A public address requires TLS and authentication.
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
        let e = start_server(&runtime, "0.0.0.0:0", &refused).err().unwrap().to_string();
        assert!(e.contains("0.0.0.0") && e.contains(why), "{e}");
    }
    let server = start_server(&runtime, "0.0.0.0:0", &c).unwrap();
    let address = format!("localhost:{}", server.address().port());
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

    // A certificate of another role is refused, too.
    let options = client_options(&c, Role::Client).unwrap();
    let result = runtime.block_on(async {
        let mut receiver = WeightReceiver::connect_with(&address, "w", &options, SOON).await?;
        receiver.fetch(Duration::ZERO).await
    });
    let e = result.err().unwrap().to_string();
    assert!(e.contains("may call the learner service"), "{e}");

    // An authenticated worker that sends too much is refused, and others are still served.
    let options = client_options(&c, Role::Rollout).unwrap();
    let channel = runtime.block_on(connect_with(&address, &options, SOON)).unwrap();
    let mut client = limited!(ExperienceClient::new(channel), 1 << 30);
    let mut submit = |r: v1::SubmitRequest| {
        let request = authorize(tonic::Request::new(r), options.token.as_ref()).unwrap();
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
        "limits are met, and the missing part is named: {e:?}"
    );
    assert!(fetch(&c).unwrap().is_some());
}
