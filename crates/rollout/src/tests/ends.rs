//! A worker whose reward service or records fail, and one that is stopped: what is handed in, what goes back.

use std::time::{Duration, Instant};

use tonic::Status;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_service::{CancellationToken, Health, READY, Routes, ServeOptions, check_health, start};
use unveil_testkit::MetricsPage;

use super::{answer, free, stage};
use crate::run;

/// Groups that wait longer than their scores may take go back and are made again once there are scores; meanwhile the worker is not
/// ready, and asks no more for groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_reward_service_groups_go_back_and_come_again() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.leases = [answer(&[0, 1], 0), answer(&[0, 1], 0)].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
    let address = address.unwrap().to_string();
    let ready = async || check_health(&address, READY, Duration::from_secs(5)).await.unwrap();
    let (mut options, reward, page) = (stage.options(), free(), free());
    options.config.reward.deadline_s = 0.3;
    options.config.rollout.metrics_listen = page.to_string();
    (options.reward, options.health) = (format!("http://{reward}"), health);
    let worker = tokio::spawn(run(options.clone(), stop.clone()));
    let begun = Instant::now();
    let until = async |what: &str, done: &dyn Fn() -> bool| {
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    until("groups go back", &|| stage.fake.with(|s| s.given_back.len() >= 2)).await;
    while ready().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not ready");
    }
    // One lease may have been under way; nothing is leased beyond it.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let leased = stage.fake.with(|s| s.leased);
    tokio::time::sleep(Duration::from_millis(700)).await;
    stage.fake.with(|s| {
        assert_eq!((s.leased, s.submitted.len()), (leased, 0), "nothing is trained as nothing");
        for g in &s.given_back {
            assert_eq!((g.worker.as_str(), g.cause()), ("w0", Cause::Unscored));
            assert!(g.why.contains(&reward.to_string()), "{}", g.why);
        }
    });
    let told = tokio::task::spawn_blocking(move || MetricsPage::get(page)).await.unwrap();
    assert!(told.of("unveil_rollout_groups_total{verdict=\"unscored\"}") >= 2.0);
    assert_eq!(told.of("unveil_rollout_rewards_away"), 1.0);
    // It comes back: the worker is ready again before it has scored anything.
    let routes = Routes::new(RewardServer::new(stage.fake.clone()));
    let _served = start(&reward.to_string(), routes, ServeOptions::default(), stage.stop.clone()).await.unwrap();
    while !ready().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is ready again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.fake.with(|s| {
        s.leases.push_back(answer(&[2, 3], 0));
        s.endless = false;
    });
    let report = worker.await.unwrap().unwrap();
    assert!(report.accepted >= 2 && report.refused >= 2 && report.finished, "{report:?}");
    stage.fake.with(|s| {
        assert!(s.submitted.iter().flat_map(|g| &g.breakdowns).all(|b| b.total == Some(0.25)));
    });
    // The page of the worker before may still be there.
    options.config.rollout.metrics_listen.clear();
    options.reward = "nowhere".into();
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("reward") && text.contains("nowhere"), "{text}");
}

/// Whatever keeps scores away for all groups sends them back; what is wrong with one group alone says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_reward_service_says_decides_why_a_group_goes_back() {
    for (status, cause) in [
        (Status::unauthenticated("the bearer token is missing or wrong"), Cause::Unscored),
        (Status::permission_denied("another role's certificate"), Cause::Unscored),
        (Status::unimplemented("no such service"), Cause::Unscored),
        (Status::invalid_argument("`record_json` is not valid"), Cause::Failed),
        (Status::out_of_range("the message is too large"), Cause::Failed),
        (Status::internal("scoring failed"), Cause::Failed),
    ] {
        let stage = stage().await;
        stage.fake.with(|s| {
            s.leases = [answer(&[0], 0)].into();
            s.unscored = [status.clone()].into();
        });
        let report = stage.run().await.unwrap();
        assert_eq!((report.accepted, report.refused, report.finished), (0, 1, true), "{status}");
        stage.fake.with(|s| {
            assert_eq!((s.submitted.len(), s.given_back.len()), (0, 1), "{status}");
            assert_eq!(s.given_back[0].cause(), cause, "{status}");
            assert!(s.given_back[0].why.contains(status.message()), "{}", s.given_back[0].why);
        });
    }
}

/// The service answers, but those that it asks are away: such a group is not trained as nothing either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_whose_scores_are_out_of_reach_goes_back() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 0)].into();
        s.out_of_reach = 1;
    });
    let report = stage.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (0, 1, true));
    stage.fake.with(|s| {
        assert_eq!((s.submitted.len(), s.given_back.len()), (0, 1));
        assert_eq!(s.given_back[0].cause(), Cause::Unscored);
        assert!(s.given_back[0].why.contains("`format`: the judge: 503"), "{}", s.given_back[0].why);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_rejected_is_not_the_end() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 0), answer(&[1], 0)].into();
        s.rejected = ["worker `w0`: a log-probability is NaN".to_owned()].into();
    });
    let report = stage.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (1, 1, true));
}

/// A group that the engine fails at ends the worker, which says so first: it may be what the next worker dies of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_the_engine_fails_at_is_told_before_the_worker_ends() {
    let stage = stage().await;
    let mut bad = answer(&[0, 1], 0);
    bad.groups[1].n = 0;
    stage.fake.with(|s| s.leases = [bad].into());
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("r1") && text.contains("at least 1"), "{text}");
    stage.fake.with(|s| {
        assert_eq!((s.submitted.len(), s.given_back.len()), (0, 1));
        let back = &s.given_back[0];
        assert_eq!((back.cause(), back.leases.len()), (Cause::Failed, 2));
        assert!(back.why.contains("r1"), "{}", back.why);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_hands_leases_back_and_is_no_error() {
    let stage = stage().await;
    let mut slow = answer(&[0, 1], 0);
    slow.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 1800));
    stage.fake.with(|s| {
        s.leases = [slow].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run(stage.options(), stop.clone()));
    while stage.fake.with(|s| s.leased == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.cancel();
    let started = Instant::now();
    let report = worker.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(4) && !report.finished && report.accepted == 0);
    stage.fake.with(|s| {
        s.released.sort();
        assert_eq!(s.released, ["lease-0", "lease-1"]);
    });
}

/// A record that cannot be made is not the end of the worker, nor of the groups beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_image_names_the_record_and_goes_back() {
    let stage = stage().await;
    let mut broken = answer(&[0, 1], 0);
    broken.groups[0].image = vec![1, 2, 3].into();
    stage.fake.with(|s| s.leases = [broken].into());
    let report = stage.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (1, 1, true));
    stage.fake.with(|s| {
        assert_eq!(s.released, ["lease-0"]);
        assert_eq!(s.given_back[0].cause(), Cause::Failed);
        assert!(s.given_back[0].why.contains("r0"), "{}", s.given_back[0].why);
    });
}
