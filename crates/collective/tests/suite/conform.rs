//! All calls, compared with what one process computes alone.

use std::time::{Duration, Instant};

use tch::{Device, Kind as Number, Tensor};
use unveil_collective::{Collective, CollectiveError, Group, World};

use super::{Kind, harness::device};

/// What a rank does; it panics where a result is not as it should be.
pub fn all(world: &World, backend: Kind, seed: u64) {
    let device = device(backend);
    let group = world.group();
    assert_eq!((group.rank(), group.world_size()), (world.rank(), world.size()));
    for number in [Number::Float, Number::BFloat16, Number::Double, Number::Int64] {
        for part in [1i64, 7, 1001, 65_537] {
            calls(group, number, part, seed, device);
        }
    }
    sums_of_reals(group, backend, seed, device);
    in_flight(group, seed, device);
    refusals(group, device);
    groups(world, seed, device);
    group.barrier().unwrap();
    assert!(world.fault().is_none());
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Whole numbers of a rank, small enough that sums are exact in bf16.
fn whole(rank: usize, count: i64, seed: u64, number: Number) -> Tensor {
    let index = Tensor::arange(count, (Number::Int64, Device::Cpu));
    (index * 7 + rank as i64 * 5 + (seed % 1000) as i64).remainder(23).to_kind(number)
}

fn sum_of(members: &[usize], count: i64, seed: u64, number: Number) -> Tensor {
    let wide: Tensor = members.iter().map(|r| whole(*r, count, seed, Number::Int64)).sum();
    wide.to_kind(number)
}

#[track_caller]
fn same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.kind(), expected.kind(), "{what}");
    assert!(found.to_device(Device::Cpu) == *expected, "{what}: {found:?} is not as computed alone");
}

/// The five calls on a group; also with an odd number of elements, and in place.
fn calls(group: &Group, number: Number, part: i64, seed: u64, device: Device) {
    let (members, place) = (group.members(), group.rank());
    let (own, count) = (members[place], part * members.len() as i64);
    let mine = |count| whole(own, count, seed, number).to_device(device);
    let what = |call| format!("{call} of {number:?} in parts of {part} among {members:?}");

    let tensor = mine(count);
    let reduced = group.all_reduce(tensor.shallow_clone()).unwrap();
    same(&reduced, &sum_of(members, count, seed, number), &what("all_reduce"));
    same(&tensor, &sum_of(members, count, seed, number), &what("all_reduce in place"));
    let odd = count + 1;
    same(&group.all_reduce(mine(odd)).unwrap(), &sum_of(members, odd, seed, number), &what("odd all_reduce"));

    let scattered = group.reduce_scatter(mine(count)).unwrap();
    let expected = sum_of(members, count, seed, number).narrow(0, place as i64 * part, part);
    same(&scattered, &expected, &what("reduce_scatter"));

    let gathered = group.all_gather(mine(part)).unwrap();
    let expected: Vec<_> = members.iter().map(|r| whole(*r, part, seed, number)).collect();
    same(&gathered, &Tensor::cat(&expected, 0), &what("all_gather"));

    for (root, rank) in members.iter().enumerate() {
        let tensor = mine(part);
        let copied = group.broadcast(tensor.shallow_clone(), root).unwrap();
        same(&copied, &whole(*rank, part, seed, number), &what("broadcast"));
        same(&tensor, &whole(*rank, part, seed, number), &what("broadcast in place"));
    }
    group.barrier().unwrap();
}

/// Sums of fractions: fp32 within 1e-6 of the sum in fp64 for each rank; bf16 over Gloo within one rounding (2^-8), over NCCL
/// within one for each rank.
fn sums_of_reals(group: &Group, backend: Kind, seed: u64, device: Device) {
    let count = 4099 * group.world_size() as i64;
    let of = |rank: usize| {
        let index = Tensor::arange(count, (Number::Double, Device::Cpu));
        (index * 0.37 + rank as f64 * 1.3 + (seed % 1000) as f64).sin() + 1.5
    };
    for (number, each) in [(Number::Float, 1e-6), (Number::BFloat16, 1.0 / 256.0)] {
        let given: Vec<_> = group.members().iter().map(|r| of(*r).to_kind(number)).collect();
        let expected: Tensor = given.iter().map(|t| t.to_kind(Number::Double)).sum();
        let once = number == Number::BFloat16 && backend == Kind::Gloo;
        let limit = if once { each } else { each * group.world_size() as f64 };
        let far = |found: Tensor, expected: &Tensor| {
            let found = found.to_device(Device::Cpu).to_kind(Number::Double);
            ((found - expected).abs() / expected.abs()).max().double_value(&[])
        };
        let mine = || given[group.rank()].to_device(device).copy();
        let reduced = far(group.all_reduce(mine()).unwrap(), &expected);
        let part = 4099;
        let own = expected.narrow(0, group.rank() as i64 * part, part);
        let scattered = far(group.reduce_scatter(mine()).unwrap(), &own);
        assert!(
            reduced <= limit && scattered <= limit,
            "{number:?}: off by {reduced:e} and {scattered:e}, limit {limit:e}"
        );
    }
}

/// Many calls of several kinds at once, waited for in another order.
fn in_flight(group: &Group, seed: u64, device: Device) {
    let members = group.members();
    let own = members[group.rank()];
    let mine = |count: i64, k: u64| whole(own, count, seed + k, Number::Float).to_device(device);
    let mut works = Vec::new();
    for k in 0..40u64 {
        let count = 100 + 13 * k as i64;
        works.push((
            k,
            count,
            group.start_all_reduce(mine(count, k)).unwrap(),
            group.start_all_gather(mine(7, k)).unwrap(),
        ));
    }
    let barrier = group.start_barrier().unwrap();
    for (k, count, reduced, gathered) in works.into_iter().rev() {
        let all: Vec<_> = members.iter().map(|r| whole(*r, 7, seed + k, Number::Float)).collect();
        same(&gathered.wait(soon()).unwrap(), &Tensor::cat(&all, 0), "all_gather in flight");
        let sum = sum_of(members, count, seed + k, Number::Float);
        same(&reduced.wait(soon()).unwrap(), &sum, "all_reduce in flight");
    }
    barrier.wait(soon()).unwrap();
}

/// What cannot be called is refused before it starts: the group goes on.
fn refusals(group: &Group, device: Device) {
    let ranks = group.world_size();
    let zeros = |count: i64, number| Tensor::zeros([count], (number, device));
    if ranks > 1 {
        let error = group.reduce_scatter(zeros(ranks as i64 * 5 + 1, Number::Float)).unwrap_err();
        let wanted = ranks * 5 + 1;
        assert!(
            matches!(error, CollectiveError::Divide { count, ranks: r, .. } if count == wanted && r == ranks),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("{wanted} elements do not divide over {ranks} ranks")), "{error}");
    }
    let error = group.broadcast(zeros(3, Number::Float), ranks).unwrap_err();
    assert!(matches!(error, CollectiveError::Rank { rank, .. } if rank == ranks), "{error}");
    for wrong in [
        zeros(4, Number::Half),
        zeros(4, Number::Float).view([2, 2]),
        zeros(0, Number::Float),
        zeros(8, Number::Float).slice(0, 0, 8, 2),
    ] {
        let error = group.all_reduce(wrong).unwrap_err();
        assert!(matches!(error, CollectiveError::Tensor { call: "all_reduce", .. }), "{error}");
    }
}

/// Groups of a part of the world, with calls in flight on two of them at once.
fn groups(world: &World, seed: u64, device: Device) {
    let size = world.size();
    let error = world.mesh(size, 2).err().unwrap();
    let text = format!("a mesh of {size} replicas x 2 shards needs {} ranks, but the world has {size}", size * 2);
    assert_eq!(error.to_string(), text);

    let (replicas, shards) = if size == 4 { (2, 2) } else { (1, size) };
    for (replicas, shards) in [(replicas, shards), (shards, replicas)] {
        let mesh = world.mesh(replicas, shards).unwrap();
        let (replica, shard) = (world.rank() / shards, world.rank() % shards);
        assert_eq!((mesh.shards.rank(), mesh.shards.world_size()), (shard, shards));
        assert_eq!((mesh.replicas.rank(), mesh.replicas.world_size()), (replica, replicas));
        let mine = || whole(world.rank(), 33, seed, Number::Float).to_device(device);
        let (a, b) = (mesh.shards.start_all_reduce(mine()).unwrap(), mesh.replicas.start_all_reduce(mine()).unwrap());
        same(&b.wait(soon()).unwrap(), &sum_of(mesh.replicas.members(), 33, seed, Number::Float), "replicas");
        same(&a.wait(soon()).unwrap(), &sum_of(mesh.shards.members(), 33, seed, Number::Float), "shards");
        calls(&mesh.shards, Number::Float, 5, seed, device);
        calls(&mesh.replicas, Number::BFloat16, 5, seed, device);
    }
    let odd = world.split("odd", |rank| rank % 2).unwrap();
    let members: Vec<usize> = (0..size).filter(|r| r % 2 == world.rank() % 2).collect();
    assert_eq!(odd.members(), members);
    calls(&odd, Number::Float, 3, seed, device);
}
