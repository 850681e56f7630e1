//! The real rollout worker on a thread, with a toy reward service.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::{breakdown_to_wire, v1};
use unveil_rollout::{WorkerOptions, WorkerReport};
use unveil_service::{CancellationToken, Routes, ServeOptions, limited};
use unveil_testkit_model::{breakdown, low_tokens};

/// Rewards low tokens, after a delay.
struct ToyReward(Duration);

#[tonic::async_trait]
impl Reward for ToyReward {
    async fn score(&self, r: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        tokio::time::sleep(self.0).await;
        let score = |r: &v1::Response| breakdown_to_wire(&breakdown("", r.index as usize, low_tokens(&r.tokens)));
        let breakdowns = r.into_inner().responses.iter().map(score).collect();
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: "toy".into() }))
    }
}

/// A runtime with one worker thread.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Starts a worker, and a reward service that takes `reward_delay` per group, on a thread that ends with the run.
pub(crate) fn start_worker(
    config: &Config,
    model: PathBuf,
    address: String,
    name: &str,
    reward_delay: Duration,
) -> JoinHandle<WorkerReport> {
    let config = config.clone();
    let name = name.to_owned();
    std::thread::spawn(move || {
        runtime().block_on(async {
            let stop = CancellationToken::new();
            let routes = Routes::new(limited!(RewardServer::new(ToyReward(reward_delay))));
            let reward =
                unveil_service::start("127.0.0.1:0", routes, ServeOptions::default(), stop.clone()).await.unwrap();
            let reward_address = format!("http://{}", reward.address);
            let options = WorkerOptions::new(config, model, format!("http://{address}"), reward_address, name);
            let report = unveil_rollout::run(options, stop.clone()).await.unwrap();
            stop.cancel();
            report
        })
    })
}
