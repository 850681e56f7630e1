//! Readiness of a worker, and roles started in any order.

use std::time::{Duration, Instant};

use unveil_proto::v1::experience_server::ExperienceServer;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_service::{CancellationToken, Health, READY, Routes, ServeOptions, check_health, start};
use unveil_testkit::free_address;

use super::{answer, start_run};
use crate::run;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_is_ready_with_weights_and_a_learner() {
    let services = start_run().await;
    let file = services.fake.with(|s| {
        s.endless = true;
        std::mem::take(&mut s.weights.1)
    });
    let stop = CancellationToken::new();
    let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
    let address = address.unwrap().to_string();
    let is_serving = async |service: &str| check_health(&address, service, Duration::from_secs(5)).await.unwrap();
    let becomes = async |ready: bool| {
        let start = Instant::now();
        while is_serving(READY).await != ready {
            assert!(start.elapsed() < Duration::from_secs(20), "ready should be {ready}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let mut options = services.options();
    options.health = health;
    options.wait = Duration::from_millis(100);
    let worker = tokio::spawn(run(options, stop.clone()));
    while services.fake.with(|s| s.weight_requests < 3) {
        assert!(is_serving("").await && !is_serving(READY).await, "no weights yet");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    services.fake.with(|s| s.weights.1 = file);
    becomes(true).await;
    services.stop.cancel();
    becomes(false).await;
    assert!(is_serving("").await && !worker.is_finished(), "it is alive and waits for the learner");
    let text = worker.await.unwrap().unwrap_err().to_string();
    assert!(text.contains("experience") && text.contains(&services.experience.address.to_string()), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_start_in_any_order() {
    let services = start_run().await;
    services.fake.with(|s| s.leases = [answer(&[0, 1], 0)].into());
    let mut options = services.options();
    let learner = free_address();
    let reward = free_address();
    options.experience = format!("http://{learner}");
    options.reward = format!("http://{reward}");
    options.config.reward.deadline_s = 60.0;
    let worker = tokio::spawn(run(options, CancellationToken::new()));
    // The worker starts first, then the learner, then the reward service once groups wait for it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!worker.is_finished());
    let serve = async |at: std::net::SocketAddr, routes: Routes| {
        start(&at.to_string(), routes, ServeOptions::default(), services.stop.clone()).await.unwrap()
    };
    let _learner = serve(learner, Routes::new(ExperienceServer::new(services.fake.clone()))).await;
    while services.fake.with(|s| s.leased == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(services.fake.with(|s| (s.submitted.len(), s.scored.len())), (0, 0));
    let _reward = serve(reward, Routes::new(RewardServer::new(services.fake.clone()))).await;
    assert_eq!(worker.await.unwrap().unwrap().accepted, 2);
    services.fake.with(|s| {
        assert!(s.submitted.iter().flat_map(|g| &g.breakdowns).all(|b| b.total == Some(0.25)), "nothing is masked");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_experience_service_is_named() {
    let services = start_run().await;
    let mut options = services.options();
    options.experience = "http://127.0.0.1:9".into();
    options.patience = Duration::from_millis(400);
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("experience") && text.contains("127.0.0.1:9"), "{text}");
}
