//! Gloo among ranks that are threads, each with its own store client: every collective against a plain sum or copy.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{ExtError, GlooGroup, GlooWork, Store};

const TIMEOUT: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + TIMEOUT
}

/// Runs `work` on each of `ranks` ranks, once all are connected: a rank that ended earlier would break the connections that others are
/// still making.
fn with_ranks(ranks: usize, timeout: Duration, work: impl Fn(usize, GlooGroup) + Sync) {
    GlooGroup::available().unwrap();
    let host = Store::host(TcpListener::bind("127.0.0.1:0").unwrap(), soon()).unwrap();
    let address = host.address();
    let connect = |rank| {
        let store = Store::join(address, soon()).unwrap();
        let group = GlooGroup::connect(&store, "g", (rank, ranks), "127.0.0.1", timeout, soon(), || false).unwrap();
        (store, group)
    };
    std::thread::scope(|s| {
        let connecting: Vec<_> = (0..ranks).map(|rank| s.spawn(move || connect(rank))).collect();
        let connected: Vec<_> = connecting.into_iter().map(|c| c.join().unwrap()).collect();
        for (rank, (store, group)) in connected.into_iter().enumerate() {
            let work = &work;
            s.spawn(move || {
                work(rank, group);
                drop(store);
            });
        }
    });
}

fn wait(mut work: GlooWork) -> Tensor {
    assert!(work.wait(TIMEOUT).unwrap(), "the call did not end");
    work.into_result().unwrap().unwrap()
}

/// Whole numbers that depend on `rank`, so that sums are exact in every dtype.
fn whole_numbers(rank: usize, count: i64, kind: Kind) -> Tensor {
    (Tensor::arange(count, (Kind::Int64, Device::Cpu)) * 7 + rank as i64 * 5).remainder(23).to_kind(kind)
}

#[test]
fn collectives_equal_plain_sums_and_copies() {
    for ranks in [2usize, 3] {
        with_ranks(ranks, TIMEOUT, |rank, group| {
            for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64] {
                for part in [1i64, 5, 1001] {
                    let count = part * ranks as i64;
                    let sum: Tensor = (0..ranks).map(|r| whole_numbers(r, count, Kind::Int64)).sum();
                    let sum = sum.to_kind(kind);

                    let mine = whole_numbers(rank, count, kind);
                    assert_eq!(wait(group.all_reduce(&mine).unwrap()), sum);
                    assert_eq!(mine, sum, "all_reduce works in place");

                    let reduced = wait(group.reduce_scatter(&whole_numbers(rank, count, kind)).unwrap());
                    assert_eq!(reduced, sum.narrow(0, rank as i64 * part, part));

                    let all: Vec<_> = (0..ranks).map(|r| whole_numbers(r, part, kind)).collect();
                    assert_eq!(wait(group.all_gather(&all[rank]).unwrap()), Tensor::cat(&all, 0));

                    let root = ranks - 1;
                    let shared = whole_numbers(rank, part, kind);
                    assert_eq!(wait(group.broadcast(&shared, root).unwrap()), all[root]);
                    assert_eq!(shared, all[root], "broadcast works in place");
                }
            }
            let mut barrier = group.barrier().unwrap();
            assert!(barrier.wait(TIMEOUT).unwrap() && barrier.into_result().unwrap().is_none());
        });
    }
}

/// bf16 sums are fp32 sums in the order of ranks, rounded once: 256 + 1 + 1 is 258, though 256 + 1 is 256 in bf16.
#[test]
fn bf16_is_summed_in_fp32() {
    with_ranks(3, TIMEOUT, |rank, group| {
        let mine = || Tensor::full([3], [256.0, 1.0, 1.0][rank], (Kind::BFloat16, Device::Cpu));
        assert_eq!(wait(group.all_reduce(&mine()).unwrap()).double_value(&[0]), 258.0);
        assert_eq!(wait(group.reduce_scatter(&mine()).unwrap()).double_value(&[0]), 258.0);
    });
}

#[test]
fn many_calls_may_be_in_flight() {
    with_ranks(2, TIMEOUT, |rank, group| {
        let calls: Vec<_> =
            (0..64).map(|i| group.all_reduce(&whole_numbers(rank + i, 100 + i as i64, Kind::Float))).collect();
        for (i, call) in calls.into_iter().enumerate().rev() {
            let count = 100 + i as i64;
            assert_eq!(
                wait(call.unwrap()),
                whole_numbers(i, count, Kind::Float) + whole_numbers(i + 1, count, Kind::Float)
            );
        }
    });
}

#[test]
fn a_call_missing_on_one_rank_times_out() {
    let timeout = Duration::from_millis(700);
    with_ranks(2, timeout, |rank, group| {
        if rank == 1 {
            std::thread::sleep(timeout * 3);
            return;
        }
        let mut work = group.all_reduce(&whole_numbers(0, 9, Kind::Float)).unwrap();
        assert!(!work.wait(Duration::from_millis(50)).unwrap());
        let error = work.wait(TIMEOUT).unwrap_err();
        assert!(matches!(&error, ExtError::Refused { what: "all_reduce", message } if !message.is_empty()), "{error}");
    });
}

#[test]
fn unsupported_tensors_are_refused() {
    with_ranks(2, TIMEOUT, |_, group| {
        let error = |r: Result<GlooWork, ExtError>| r.err().unwrap().to_string();
        let square = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
        assert!(error(group.all_reduce(&square)).contains("this is Float [2, 2] on Cpu"));
        assert!(error(group.all_gather(&square.view([4]).to_kind(Kind::Half))).contains("this is Half [4]"));
        assert!(
            error(group.reduce_scatter(&square.view([4]).narrow(0, 0, 3))).contains("3 elements do not divide over 2")
        );
        assert!(error(group.broadcast(&square.view([4]), 2)).contains("rank 2 is not below 2"));
    });
}

#[test]
fn connecting_times_out_or_is_cancelled() {
    let store = Store::host(TcpListener::bind("127.0.0.1:0").unwrap(), soon()).unwrap();
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(1);
    let error = GlooGroup::connect(&store, "g", (0, 2), "127.0.0.1", TIMEOUT, deadline, || false).err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4), "{error}");
    let begin = Instant::now();
    let error = GlooGroup::connect(&store, "h", (0, 2), "127.0.0.1", TIMEOUT, soon(), || true).err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4) && error.to_string().contains("cancelled"), "{error}");
}
