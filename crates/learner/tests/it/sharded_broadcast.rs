//! A learner with sharded parameters broadcasts them whole.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use tch::{Device, Kind};
use unveil_collective::{Backend, Setup, Timeouts, open};
use unveil_testkit::{KilledOnDrop, free_address, ignored_test};
use unveil_testkit_model::{PATIENCE, WeightPublisher, bits, configured, low_tokens, model, rollout};
use unveil_trainer::{Models, PolicyTrainer, Ranks, ZeroStage};

const RANK: &str = "UNVEIL_TEST_RANK";
const PORT: &str = "UNVEIL_TEST_PORT";

/// Returns the bytes of the parameters by name.
fn whole(learner: &PolicyTrainer) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = learner.vlm().named_parameters().iter().map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    all
}

#[test]
#[ignore = "a rank of a learner, which another test starts"]
fn rank() {
    let Ok(rank) = std::env::var(RANK) else { return };
    let rank: usize = rank.parse().unwrap();
    let vlm = model(5);
    let batch = rollout(&vlm, 2, 3, 0, &low_tokens);
    let address = format!("127.0.0.1:{}", std::env::var(PORT).unwrap());
    let backend = Backend::Gloo;
    let fingerprint = "test".into();
    let timeouts = Timeouts::within(PATIENCE);
    let setup = Setup { rank, world: 2, address, local_address: None, backend, fingerprint, token: None, timeouts };
    let ranks = Ranks::new(open(&setup).unwrap(), ZeroStage::Parameters, 0).unwrap();
    let settings = configured(&vlm, 20, |_| ());
    let mut learner =
        PolicyTrainer::distributed(ranks, Models { vlm, reference: None, critic: None }, settings).unwrap();
    let served = (rank == 0).then(|| WeightPublisher::new(Device::Cpu));
    let publish = |version: u64, learner: &PolicyTrainer| {
        if let Some(s) = &served {
            s.publish_these(version, learner.vlm().named_parameters(), Kind::Float, &|_| true);
        }
    };
    learner.gather_parameters().unwrap();
    publish(0, &learner);
    let worker = served.as_ref().map(|s| s.subscribe("worker"));
    let first = worker.as_ref().map(|w| w.wait_for(0).tensors);
    learner.update(&batch).unwrap();
    learner.gather_parameters().unwrap();
    publish(1, &learner);
    // Weights of the optimiser, gathered independently.
    let state = learner.state().unwrap().0;
    if let (Some(s), Some(worker)) = (&served, worker) {
        let wanted = whole(&learner);
        let bytes = wanted.iter().map(|(_, b)| b.len() as u64).sum();
        assert_eq!(s.sent(), (1, 1, 1, bytes));
        let received = worker.wait_for(1);
        assert!(!received.whole && received.tensors == wanted && Some(&received.tensors) != first.as_ref());
        for (name, tensor) in &state {
            let tensor_bytes = received.tensors.iter().find(|(n, _)| n == name);
            assert!(tensor_bytes.is_some_and(|(_, tensor_bytes)| *tensor_bytes == bits(tensor)), "{name}");
        }
        println!("RIGHT {}", state.len());
    }
}

#[test]
fn sharded_parameters_are_broadcast_whole() {
    let port = free_address().port().to_string();
    let start = |rank: usize| {
        let mut command = ignored_test("sharded_broadcast::rank");
        command.env(RANK, rank.to_string()).env(PORT, &port).stdout(Stdio::piped());
        KilledOnDrop(command.spawn().unwrap())
    };
    let mut zero = start(0);
    let mut one = start(1);
    let lines = BufReader::new(zero.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let right: Vec<String> = lines.filter(|l| l.contains("RIGHT ")).collect();
    assert!(right.len() == 1 && !right[0].contains("RIGHT 0"), "{right:?}");
    assert!(zero.0.wait().unwrap().success() && one.0.wait().unwrap().success());
}
