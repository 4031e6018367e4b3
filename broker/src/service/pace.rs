//! The pace of questions that nobody's work waits for: one at a time, with a rest after each. Everybody's calls are answered
//! on one thread, so many questions at once would hold up what engines wait for.

use std::time::{Duration, Instant};

use tokio::sync::{Mutex, MutexGuard};

/// A rest is so many times as long as the answer before it took: answers take a hundredth of the time at most.
const REST: u32 = 100;
/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Questions that share one pace.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the next question may be answered. Held by the one that is being answered.
    next: Mutex<Option<Instant>>,
}

/// One question's time. The rest begins when it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    next: MutexGuard<'a, Option<Instant>>,
    began: Instant,
}

impl Pace {
    /// Waits for a turn. Whoever gives up waiting takes nobody's place.
    pub(super) async fn turn(&self) -> Turn<'_> {
        let next = self.next.lock().await;
        if let Some(at) = *next {
            tokio::time::sleep_until(at.into()).await;
        }
        Turn {
            next,
            began: Instant::now(),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let rest = self.began.elapsed().saturating_mul(REST).min(LONGEST_REST);
        *self.next = Some(Instant::now() + rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long an answer takes here, at least.
    const WORK: Duration = Duration::from_millis(1);

    async fn answer(pace: &Pace) -> (Instant, Instant) {
        let turn = pace.turn().await;
        let began = turn.began;
        while began.elapsed() < WORK {
            std::hint::spin_loop();
        }
        let ended = Instant::now();
        drop(turn);
        (began, ended)
    }

    #[tokio::test]
    async fn after_an_answer_comes_a_rest_a_hundred_times_as_long() {
        let pace = Pace::default();
        let answers = tokio::join!(answer(&pace), answer(&pace), answer(&pace));
        let mut times = [answers.0, answers.1, answers.2];
        times.sort();
        for pair in times.windows(2) {
            assert!(pair[1].0 >= pair[0].1 + WORK * REST, "{times:?}");
        }
        // The twin: two paces know nothing of each other, and one may be answered in the other's rest.
        let (one, other) = (Pace::default(), Pace::default());
        let first = answer(&one).await;
        assert!(other.next.lock().await.is_none() && one.next.lock().await.is_some());
        assert!(first.1 >= first.0 + WORK);
    }

    #[tokio::test]
    async fn whoever_gives_up_waiting_holds_nobody_up() {
        let pace = Pace::default();
        let turn = pace.turn().await;
        {
            let waits = pace.turn();
            tokio::pin!(waits);
            tokio::select! {
                biased;
                _ = &mut waits => panic!("two at a time"),
                () = tokio::task::yield_now() => {}
            }
        }
        drop(turn);
        drop(pace.turn().await);
    }
}
