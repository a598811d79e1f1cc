//! Work that several threads begin at the same moment.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// Runs each job on a thread of its own, the first on the caller's. Gives their results, and the time from the moment
/// at which all have begun to the end of the slowest.
pub fn together<T: Send, J: FnOnce() -> T + Send>(jobs: Vec<J>) -> (Vec<T>, Duration) {
    let barrier = Barrier::new(jobs.len());
    let timed = |job: J| {
        barrier.wait();
        (Instant::now(), job(), Instant::now())
    };
    thread::scope(|scope| {
        let mut jobs = jobs.into_iter();
        let own = jobs.next().expect("together: there is no job");
        let timed = &timed;
        let others: Vec<_> = jobs.map(|job| scope.spawn(move || timed(job))).collect();
        let mut done = vec![timed(own)];
        done.extend(others.into_iter().map(|other| other.join().expect("a measured job does not panic")));
        let begun = done.iter().map(|(begun, ..)| *begun).min().expect("there is a job");
        let ended = done.iter().map(|(.., ended)| *ended).max().expect("there is a job");
        (done.into_iter().map(|(_, result, _)| result).collect(), ended - begun)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_results_come_back_in_order_and_the_slowest_counts() {
        let sleep = |ms| {
            move || {
                thread::sleep(Duration::from_millis(ms));
                ms
            }
        };
        let (results, time) = together([1, 30, 2].map(sleep).into());
        assert_eq!(results, [1, 30, 2]);
        assert!(time >= Duration::from_millis(30), "{time:?}");
    }
}
