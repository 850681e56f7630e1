//! Work on the items of a list by several threads, such as the decoding of images while the device waits for a batch.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{LearnerError, Result};

/// Name of the threads.
const NAME: &str = "prepare";

/// Returns the number of threads for a configured number, of which 0 means all cores.
pub(crate) fn thread_count(configured: usize) -> usize {
    if configured > 0 { configured } else { std::thread::available_parallelism().map_or(1, usize::from) }
}

/// Applies `work` to all `items` on up to `threads` threads, one of which is the caller's, and returns the results in the order of the
/// items.
///
/// # Errors
/// Returns the error of the first item that has one, and [`LearnerError::Thread`] if the operating system refuses a thread.
pub(crate) fn map_in_parallel<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let mut helpers = Vec::new();
        for _ in 1..threads.min(items.len()) {
            let helper = std::thread::Builder::new().name(NAME.to_owned()).spawn_scoped(scope, run);
            helpers.push(helper.map_err(|source| LearnerError::Thread { name: NAME, source })?);
        }
        let mut done = run();
        for helper in helpers {
            done.extend(helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        Ok::<_, LearnerError>(done)
    })?;
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        let items: Vec<usize> = (0..100).collect();
        for threads in [0, 1, 3, 200] {
            let squares = map_in_parallel(&items, threads, |i| Ok(i * i)).unwrap();
            assert_eq!(squares, items.iter().map(|i| i * i).collect::<Vec<_>>(), "{threads} threads");
        }
        assert!(map_in_parallel(&[], 4, |i: &usize| Ok(*i)).unwrap().is_empty());
        assert!(thread_count(0) > 0 && thread_count(3) == 3);
    }

    /// Each item waits until all are being worked on.
    #[test]
    fn items_are_worked_on_at_the_same_time() {
        let started = Mutex::new(0);
        let changed = Condvar::new();
        let together = map_in_parallel(&[1, 2, 3], 3, |_| {
            let mut count = started.lock().unwrap();
            *count += 1;
            changed.notify_all();
            let (_guard, wait) = changed.wait_timeout_while(count, Duration::from_secs(20), |n| *n < 3).unwrap();
            Ok(!wait.timed_out())
        });
        assert_eq!(together.unwrap(), [true, true, true]);
    }

    #[test]
    fn first_error_in_order_is_returned() {
        let failing = |i: &usize| match i {
            4 | 7 => Err(LearnerError::RecordIndex { index: *i, count: 4 }),
            i => Ok(*i),
        };
        let e = map_in_parallel(&(0..9).collect::<Vec<_>>(), 4, failing).unwrap_err();
        assert!(matches!(e, LearnerError::RecordIndex { index: 4, .. }), "{e}");
    }
}
