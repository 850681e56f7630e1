//! A worker whose reward service or records fail, or that is stopped: the groups that it submits and releases.

use std::time::{Duration, Instant};

use tonic::Status;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_service::{CancellationToken, Health, READY, Routes, ServeOptions, check_health, start};
use unveil_testkit::{MetricsPage, free_address};

use super::{answer, set_size, start_run};
use crate::run;

/// Groups that wait longer than the reward deadline are released, and generated again once rewards are available; in the meantime the
/// worker is not ready and leases no groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_are_released_during_a_reward_outage() {
    let services = start_run().await;
    services.fake.with(|s| {
        s.leases = [answer(&[0, 1], 0), answer(&[0, 1], 0)].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
    let address = address.unwrap().to_string();
    let ready = async || check_health(&address, READY, Duration::from_secs(5)).await.unwrap();
    let mut options = services.options();
    let reward = free_address();
    let page = free_address();
    options.config.reward.deadline_s = 0.3;
    options.config.rollout.metrics_listen = page.to_string();
    options.reward = format!("http://{reward}");
    options.health = health;
    let worker = tokio::spawn(run(options.clone(), stop.clone()));
    let begun = Instant::now();
    let until = async |what: &str, done: &dyn Fn() -> bool| {
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    until("groups are released", &|| services.fake.with(|s| s.released_with_cause.len() >= 2)).await;
    while ready().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not ready");
    }
    // One lease call may have been in flight; no further group is leased.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let leased = services.fake.with(|s| s.leased);
    tokio::time::sleep(Duration::from_millis(700)).await;
    services.fake.with(|s| {
        assert_eq!((s.leased, s.submitted.len()), (leased, 0), "unscored groups are not submitted");
        for g in &s.released_with_cause {
            assert_eq!((g.worker.as_str(), g.cause()), ("w0", Cause::Unscored));
            assert!(g.why.contains(&reward.to_string()), "{}", g.why);
        }
    });
    let metrics = tokio::task::spawn_blocking(move || MetricsPage::get(page)).await.unwrap();
    assert!(metrics.expect_value("unveil_rollout_groups_total{verdict=\"unscored\"}") >= 2.0);
    assert_eq!(metrics.expect_value("unveil_rollout_rewards_away"), 1.0);
    // Once the service is available, the worker is ready before it has scored a group.
    let routes = Routes::new(RewardServer::new(services.fake.clone()));
    let _served = start(&reward.to_string(), routes, ServeOptions::default(), services.stop.clone()).await.unwrap();
    while !ready().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is ready again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    services.fake.with(|s| {
        s.leases.push_back(answer(&[2, 3], 0));
        s.endless = false;
    });
    let report = worker.await.unwrap().unwrap();
    assert!(report.accepted >= 2 && report.refused >= 2 && report.finished, "{report:?}");
    services.fake.with(|s| {
        assert!(s.submitted.iter().flat_map(|g| &g.breakdowns).all(|b| b.total == Some(0.25)));
    });
    // The metrics page of the first worker may still be served.
    options.config.rollout.metrics_listen.clear();
    options.reward = "nowhere".into();
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("reward") && text.contains("nowhere"), "{text}");
}

/// A failure that concerns all groups releases them as unscored; a failure of one group releases it as failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_of_the_reward_service_sets_the_cause() {
    for (status, cause) in [
        (Status::unauthenticated("the bearer token is missing or wrong"), Cause::Unscored),
        (Status::permission_denied("another role's certificate"), Cause::Unscored),
        (Status::unimplemented("no such service"), Cause::Unscored),
        (Status::invalid_argument("`record_json` is not valid"), Cause::Failed),
        (Status::out_of_range("the message is too large"), Cause::Failed),
        (Status::internal("scoring failed"), Cause::Failed),
    ] {
        let services = start_run().await;
        services.fake.with(|s| {
            s.leases = [answer(&[0], 0)].into();
            s.unscored = [status.clone()].into();
        });
        let report = services.run().await.unwrap();
        assert_eq!((report.accepted, report.refused, report.finished), (0, 1, true), "{status}");
        services.fake.with(|s| {
            assert_eq!((s.submitted.len(), s.released_with_cause.len()), (0, 1), "{status}");
            assert_eq!(s.released_with_cause[0].cause(), cause, "{status}");
            assert!(s.released_with_cause[0].why.contains(status.message()), "{}", s.released_with_cause[0].why);
        });
    }
}

/// The service answers, but its scorers are unavailable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn group_with_unavailable_scorers_is_released() {
    let services = start_run().await;
    services.fake.with(|s| {
        s.leases = [answer(&[0], 0)].into();
        s.unavailable_scorers = 1;
    });
    let report = services.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (0, 1, true));
    services.fake.with(|s| {
        assert_eq!((s.submitted.len(), s.released_with_cause.len()), (0, 1));
        assert_eq!(s.released_with_cause[0].cause(), Cause::Unscored);
        assert!(s.released_with_cause[0].why.contains("`format`: the judge: 503"), "{}", s.released_with_cause[0].why);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_continues_after_a_rejected_group() {
    let services = start_run().await;
    services.fake.with(|s| {
        s.leases = [answer(&[0], 0), answer(&[1], 0)].into();
        s.rejected = ["worker `w0`: a log-probability is NaN".to_owned()].into();
    });
    let report = services.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (1, 1, true));
}

/// A group that the engine fails on ends the worker, which reports it first: it may end the next worker, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engine_failure_is_reported_before_the_worker_ends() {
    let services = start_run().await;
    let mut invalid = answer(&[0, 1], 0);
    invalid.groups[1].sampling.as_mut().unwrap().n = 0;
    services.fake.with(|s| s.leases = [invalid].into());
    let text = services.run().await.unwrap_err().to_string();
    assert!(text.contains("r1") && text.contains("at least 1"), "{text}");
    services.fake.with(|s| {
        assert_eq!((s.submitted.len(), s.released_with_cause.len()), (0, 1));
        let released = &s.released_with_cause[0];
        assert_eq!((released.cause(), released.leases.len()), (Cause::Failed, 2));
        assert!(released.why.contains("r1"), "{}", released.why);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_releases_leases() {
    let services = start_run().await;
    let mut slow = answer(&[0, 1], 0);
    set_size(&mut slow, 8, 1800);
    services.fake.with(|s| {
        s.leases = [slow].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run(services.options(), stop.clone()));
    while services.fake.with(|s| s.leased == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.cancel();
    let started = Instant::now();
    let report = worker.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(4) && !report.finished && report.accepted == 0);
    services.fake.with(|s| {
        s.released.sort();
        assert_eq!(s.released, ["lease-0", "lease-1"]);
    });
}

/// Every group of the run is done, so a group in flight is not needed, and a learner that has left is no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn group_in_flight_at_the_end_of_the_run_is_dropped() {
    let services = start_run().await;
    let mut slow = answer(&[0], 0);
    set_size(&mut slow, 8, 1800);
    services.fake.with(|s| s.leases = [slow].into());
    let worker = tokio::spawn(run(services.options(), CancellationToken::new()));
    // The lease call after the group's says that the run is finished.
    let begun = Instant::now();
    while services.fake.with(|s| s.held_at_lease.len() < 2) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the worker does not ask for further groups");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    services.stop.cancel();
    let report = tokio::time::timeout(Duration::from_secs(60), worker).await.unwrap().unwrap().unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (0, 0, true));
}

/// A record that cannot be prepared ends neither the worker nor the other groups of its batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_image_releases_its_group() {
    let services = start_run().await;
    let mut broken = answer(&[0, 1], 0);
    broken.groups[0].image = vec![1, 2, 3].into();
    services.fake.with(|s| s.leases = [broken].into());
    let report = services.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (1, 1, true));
    services.fake.with(|s| {
        assert_eq!(s.released, ["lease-0"]);
        assert_eq!(s.released_with_cause[0].cause(), Cause::Failed);
        assert!(s.released_with_cause[0].why.contains("r0"), "{}", s.released_with_cause[0].why);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_without_sampling_parameters_is_refused() {
    let services = start_run().await;
    let mut bare = answer(&[0], 0);
    bare.groups[0].sampling = None;
    services.fake.with(|s| s.leases = [bare].into());
    let error = services.run().await.unwrap_err().to_string();
    assert!(error.contains("sent an inconsistent lease: required field `sampling` is not set"), "{error}");
}
