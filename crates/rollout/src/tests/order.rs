//! When a worker is ready, and that the roles may be started in any order.

use std::time::{Duration, Instant};

use unveil_proto::v1::experience_server::ExperienceServer;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_service::{CancellationToken, Health, READY, Routes, ServeOptions, check_health, start};

use super::{answer, free, stage};
use crate::run;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_ready_while_it_has_weights_and_the_learner_answers() {
    let stage = stage().await;
    let file = stage.fake.with(|s| {
        s.endless = true;
        std::mem::take(&mut s.weights.1)
    });
    let stop = CancellationToken::new();
    let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
    let address = address.unwrap().to_string();
    let asked = async |service: &str| check_health(&address, service, Duration::from_secs(5)).await.unwrap();
    let becomes = async |ready: bool| {
        let start = Instant::now();
        while asked(READY).await != ready {
            assert!(start.elapsed() < Duration::from_secs(20), "ready should be {ready}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let mut options = stage.options();
    (options.health, options.wait) = (health, Duration::from_millis(100));
    let worker = tokio::spawn(run(options, stop.clone()));
    while stage.fake.with(|s| s.asked < 3) {
        assert!(asked("").await && !asked(READY).await, "no weights yet");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.fake.with(|s| s.weights.1 = file);
    becomes(true).await;
    stage.stop.cancel();
    becomes(false).await;
    assert!(asked("").await && !worker.is_finished(), "it waits for the learner, alive");
    let text = worker.await.unwrap().unwrap_err().to_string();
    assert!(text.contains("experience") && text.contains(&stage.experience.address.to_string()), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_may_come_in_any_order() {
    let stage = stage().await;
    stage.fake.with(|s| s.leases = [answer(&[0, 1], 0)].into());
    let (mut options, learner, reward) = (stage.options(), free(), free());
    options.experience = format!("http://{learner}");
    options.reward = format!("http://{reward}");
    options.config.reward.deadline_s = 60.0;
    let worker = tokio::spawn(run(options, CancellationToken::new()));
    // The worker first; then the learner; the reward service when groups wait for it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.is_finished());
    let serve = async |at: std::net::SocketAddr, routes: Routes| {
        start(&at.to_string(), routes, ServeOptions::default(), stage.stop.clone()).await.unwrap()
    };
    let _learner = serve(learner, Routes::new(ExperienceServer::new(stage.fake.clone()))).await;
    while stage.fake.with(|s| s.leased == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(stage.fake.with(|s| (s.submitted.len(), s.scored.len())), (0, 0));
    let _reward = serve(reward, Routes::new(RewardServer::new(stage.fake.clone()))).await;
    assert_eq!(worker.await.unwrap().unwrap().accepted, 2);
    stage.fake.with(|s| {
        assert!(s.submitted.iter().flat_map(|g| &g.breakdowns).all(|b| b.total == Some(0.25)), "nothing is masked");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_experience_service_is_named() {
    let stage = stage().await;
    let mut options = stage.options();
    options.experience = "http://127.0.0.1:9".into();
    options.patience = Duration::from_millis(400);
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("experience") && text.contains("127.0.0.1:9"), "{text}");
}
