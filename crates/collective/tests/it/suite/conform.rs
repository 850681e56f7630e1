//! All calls, compared with a computation in one process.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use unveil_collective::{Collective, CollectiveError, Group, World};

use super::{TestBackend, harness::device};

/// Makes all calls on this rank; panics on a wrong result.
pub(crate) fn check_all_calls(world: &World, backend: TestBackend, seed: u64) {
    let device = device(backend);
    let group = world.group();
    assert_eq!((group.rank(), group.world_size()), (world.rank(), world.size()));
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Int64] {
        for shard_len in [1i64, 7, 1001, 65_537] {
            check_calls(group, kind, shard_len, seed, device);
        }
    }
    check_sum_precision(group, backend, seed, device);
    check_calls_in_flight(group, seed, device);
    check_refusals(group, device);
    check_groups(world, seed, device);
    group.barrier().unwrap();
    assert!(world.fault().is_none());
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Integers that depend on the rank, small enough that sums are exact in bf16.
fn integers(rank: usize, count: i64, seed: u64, kind: Kind) -> Tensor {
    let index = Tensor::arange(count, (Kind::Int64, Device::Cpu));
    (index * 7 + rank as i64 * 5 + (seed % 1000) as i64).remainder(23).to_kind(kind)
}

fn sum_of(members: &[usize], count: i64, seed: u64, kind: Kind) -> Tensor {
    let sum: Tensor = members.iter().map(|r| integers(*r, count, seed, Kind::Int64)).sum();
    sum.to_kind(kind)
}

#[track_caller]
fn assert_same(actual: &Tensor, expected: &Tensor, call: &str) {
    assert_eq!(actual.kind(), expected.kind(), "{call}");
    assert!(
        actual.to_device(Device::Cpu) == *expected,
        "{call}: {actual:?} differs from the computation in one process"
    );
}

/// Checks the five calls on a group, also with a number of elements that does not divide evenly, and in place.
fn check_calls(group: &Group, kind: Kind, shard_len: i64, seed: u64, device: Device) {
    let members = group.members();
    let group_rank = group.rank();
    let world_rank = members[group_rank];
    let count = shard_len * members.len() as i64;
    let input = |count| integers(world_rank, count, seed, kind).to_device(device);
    let context = |call| format!("{call} of {kind:?} in shards of {shard_len} among {members:?}");

    let tensor = input(count);
    let reduced = group.all_reduce(tensor.shallow_clone()).unwrap();
    assert_same(&reduced, &sum_of(members, count, seed, kind), &context("all_reduce"));
    assert_same(&tensor, &sum_of(members, count, seed, kind), &context("all_reduce in place"));
    let uneven = count + 1;
    let reduced = group.all_reduce(input(uneven)).unwrap();
    assert_same(&reduced, &sum_of(members, uneven, seed, kind), &context("uneven all_reduce"));

    let scattered = group.reduce_scatter(input(count)).unwrap();
    let expected = sum_of(members, count, seed, kind).narrow(0, group_rank as i64 * shard_len, shard_len);
    assert_same(&scattered, &expected, &context("reduce_scatter"));

    let gathered = group.all_gather(input(shard_len)).unwrap();
    let expected: Vec<_> = members.iter().map(|r| integers(*r, shard_len, seed, kind)).collect();
    assert_same(&gathered, &Tensor::cat(&expected, 0), &context("all_gather"));

    for (root, rank) in members.iter().enumerate() {
        let tensor = input(shard_len);
        let copied = group.broadcast(tensor.shallow_clone(), root).unwrap();
        assert_same(&copied, &integers(*rank, shard_len, seed, kind), &context("broadcast"));
        assert_same(&tensor, &integers(*rank, shard_len, seed, kind), &context("broadcast in place"));
    }
    group.barrier().unwrap();
}

/// Checks the precision of sums: fp32 within 1e-6 per rank of the sum in fp64; bf16 within one rounding (2^-8) over Gloo, and within
/// one rounding per rank over NCCL.
fn check_sum_precision(group: &Group, backend: TestBackend, seed: u64, device: Device) {
    let count = 4099 * group.world_size() as i64;
    let reals = |rank: usize| {
        let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
        (index * 0.37 + rank as f64 * 1.3 + (seed % 1000) as f64).sin() + 1.5
    };
    for (kind, rounding) in [(Kind::Float, 1e-6), (Kind::BFloat16, 1.0 / 256.0)] {
        let inputs: Vec<_> = group.members().iter().map(|r| reals(*r).to_kind(kind)).collect();
        let expected: Tensor = inputs.iter().map(|t| t.to_kind(Kind::Double)).sum();
        let rounded_once = kind == Kind::BFloat16 && backend == TestBackend::Gloo;
        let limit = if rounded_once { rounding } else { rounding * group.world_size() as f64 };
        let relative_error = |sum: Tensor, expected: &Tensor| {
            let sum = sum.to_device(Device::Cpu).to_kind(Kind::Double);
            ((sum - expected).abs() / expected.abs()).max().double_value(&[])
        };
        let input = || inputs[group.rank()].to_device(device).copy();
        let reduced = relative_error(group.all_reduce(input()).unwrap(), &expected);
        let shard_len = 4099;
        let expected_shard = expected.narrow(0, group.rank() as i64 * shard_len, shard_len);
        let scattered = relative_error(group.reduce_scatter(input()).unwrap(), &expected_shard);
        assert!(
            reduced <= limit && scattered <= limit,
            "{kind:?}: relative errors {reduced:e} and {scattered:e}, limit {limit:e}"
        );
    }
}

/// Checks many calls of several kinds in flight at a time, waited for in another order.
fn check_calls_in_flight(group: &Group, seed: u64, device: Device) {
    let members = group.members();
    let world_rank = members[group.rank()];
    let input = |count: i64, k: u64| integers(world_rank, count, seed + k, Kind::Float).to_device(device);
    let mut works = Vec::new();
    for k in 0..40u64 {
        let count = 100 + 13 * k as i64;
        works.push((
            k,
            count,
            group.start_all_reduce(input(count, k)).unwrap(),
            group.start_all_gather(input(7, k)).unwrap(),
        ));
    }
    let barrier = group.start_barrier().unwrap();
    for (k, count, reduced, gathered) in works.into_iter().rev() {
        let all: Vec<_> = members.iter().map(|r| integers(*r, 7, seed + k, Kind::Float)).collect();
        assert_same(&gathered.wait(soon()).unwrap(), &Tensor::cat(&all, 0), "all_gather in flight");
        let sum = sum_of(members, count, seed + k, Kind::Float);
        assert_same(&reduced.wait(soon()).unwrap(), &sum, "all_reduce in flight");
    }
    barrier.wait(soon()).unwrap();
}

/// Checks that an invalid call is refused before it starts, and that the group stays usable.
fn check_refusals(group: &Group, device: Device) {
    let ranks = group.world_size();
    let zeros = |count: i64, kind| Tensor::zeros([count], (kind, device));
    if ranks > 1 {
        let error = group.reduce_scatter(zeros(ranks as i64 * 5 + 1, Kind::Float)).unwrap_err();
        let elements = ranks * 5 + 1;
        assert!(
            matches!(error, CollectiveError::Indivisible { count, ranks: r, .. } if count == elements && r == ranks),
            "{error}"
        );
        assert!(
            error.to_string().contains(&format!("{elements} elements do not divide over {ranks} ranks")),
            "{error}"
        );
    }
    let error = group.broadcast(zeros(3, Kind::Float), ranks).unwrap_err();
    assert!(matches!(error, CollectiveError::Rank { rank, .. } if rank == ranks), "{error}");
    for invalid in [
        zeros(4, Kind::Half),
        zeros(4, Kind::Float).view([2, 2]),
        zeros(0, Kind::Float),
        zeros(8, Kind::Float).slice(0, 0, 8, 2),
    ] {
        let error = group.all_reduce(invalid).unwrap_err();
        assert!(matches!(error, CollectiveError::Tensor { call: "all_reduce", .. }), "{error}");
    }
}

/// Checks groups of some ranks of the world, with calls in flight on two of them at a time.
fn check_groups(world: &World, seed: u64, device: Device) {
    let size = world.size();
    let error = world.mesh(size, 2).err().unwrap();
    let text = format!("a mesh of {size} replicas x 2 shards needs {} ranks, but the world has {size}", size * 2);
    assert_eq!(error.to_string(), text);

    let (replicas, shards) = if size == 4 { (2, 2) } else { (1, size) };
    for (replicas, shards) in [(replicas, shards), (shards, replicas)] {
        let mesh = world.mesh(replicas, shards).unwrap();
        let replica = world.rank() / shards;
        let shard = world.rank() % shards;
        assert_eq!((mesh.shards.rank(), mesh.shards.world_size()), (shard, shards));
        assert_eq!((mesh.replicas.rank(), mesh.replicas.world_size()), (replica, replicas));
        let input = || integers(world.rank(), 33, seed, Kind::Float).to_device(device);
        let over_shards = mesh.shards.start_all_reduce(input()).unwrap();
        let over_replicas = mesh.replicas.start_all_reduce(input()).unwrap();
        let replica_sum = sum_of(mesh.replicas.members(), 33, seed, Kind::Float);
        assert_same(&over_replicas.wait(soon()).unwrap(), &replica_sum, "replicas");
        let shard_sum = sum_of(mesh.shards.members(), 33, seed, Kind::Float);
        assert_same(&over_shards.wait(soon()).unwrap(), &shard_sum, "shards");
        check_calls(&mesh.shards, Kind::Float, 5, seed, device);
        check_calls(&mesh.replicas, Kind::BFloat16, 5, seed, device);
    }
    let parity_group = world.split("parity", |rank| rank % 2).unwrap();
    let members: Vec<usize> = (0..size).filter(|r| r % 2 == world.rank() % 2).collect();
    assert_eq!(parity_group.members(), members);
    check_calls(&parity_group, Kind::Float, 3, seed, device);
}
