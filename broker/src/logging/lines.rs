//! Lines on their way to a writer that may block, such as a pipe that nobody reads. Whoever logs never waits for it.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// The most bytes of lines that wait for the writer. Later lines are dropped and counted.
const QUEUE_BYTES: usize = 1 << 20;

/// Where lines are put down. Clones share one queue and one writer.
#[derive(Clone)]
pub(crate) struct Lines {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Something was put into the queue.
    filled: Condvar,
    /// The writer has written everything.
    emptied: Condvar,
    /// Lines that were dropped since the start.
    dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that were dropped since the writer last said so.
    unsaid: u64,
    /// The writer has lines that it took out of the queue.
    writing: bool,
}

impl Lines {
    /// Starts a thread that writes to `out`. `notice` makes the line that says how many lines were dropped.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(crate) fn start(
        out: impl Write + Send + 'static,
        notice: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let lines = Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                filled: Condvar::new(),
                emptied: Condvar::new(),
                dropped: AtomicU64::new(0),
            }),
        };
        let shared = Arc::clone(&lines.shared);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || shared.write(out, &notice))?;
        Ok(lines)
    }

    /// How many lines were dropped since the start.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything is written, but no longer than `patience`. Returns whether it is.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut queue = self.shared.queue.lock();
        while queue.writing || !queue.lines.is_empty() {
            if self
                .shared
                .emptied
                .wait_until(&mut queue, until)
                .timed_out()
            {
                return false;
            }
        }
        true
    }

    fn put(&self, line: Vec<u8>) {
        let mut queue = self.shared.queue.lock();
        if queue.bytes + line.len() > QUEUE_BYTES {
            queue.unsaid += 1;
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        self.shared.filled.notify_one();
    }
}

impl Shared {
    /// Writes lines for as long as the process lives.
    fn write(&self, mut out: impl Write, notice: &dyn Fn(u64) -> String) {
        loop {
            let mut queue = self.queue.lock();
            while queue.lines.is_empty() && queue.unsaid == 0 {
                queue.writing = false;
                self.emptied.notify_all();
                self.filled.wait(&mut queue);
            }
            queue.writing = true;
            let lines = std::mem::take(&mut queue.lines);
            let unsaid = std::mem::take(&mut queue.unsaid);
            queue.bytes = 0;
            drop(queue);
            for line in &lines {
                // There is nobody to tell that a line cannot be written.
                drop(out.write_all(line));
            }
            if unsaid > 0 {
                drop(out.write_all(notice(unsaid).as_bytes()));
            }
        }
    }
}

/// One line. It is put down when it is dropped.
pub(crate) struct Line<'a> {
    lines: &'a Lines,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        self.lines.put(std::mem::take(&mut self.bytes));
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            lines: self,
            bytes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A writer that writes nothing until it is let go, like a pipe that nobody reads.
    #[derive(Clone, Default)]
    struct Stuck {
        shared: Arc<(Mutex<Written>, Condvar)>,
    }

    #[derive(Default)]
    struct Written {
        may_go: bool,
        bytes: Vec<u8>,
    }

    impl Stuck {
        fn let_go(&self) {
            self.shared.0.lock().may_go = true;
            self.shared.1.notify_all();
        }
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut written = self.shared.0.lock();
            while !written.may_go {
                self.shared.1.wait(&mut written);
            }
            written.bytes.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn notice(lines: u64) -> String {
        format!("{lines} dropped\n")
    }

    /// As many lines as the queue has room for, twice.
    fn too_many(mut write: impl FnMut(&[u8])) -> u64 {
        let line = [b'x'; 1 << 10];
        let count = 2 * QUEUE_BYTES / line.len();
        for _ in 0..count {
            write(&line);
        }
        count as u64
    }

    #[test]
    fn whoever_logs_never_waits_and_what_is_dropped_is_counted_and_said() {
        let stuck = Stuck::default();
        let lines = Lines::start(stuck.clone(), notice).unwrap();
        let (say, hear) = mpsc::channel();
        let (copy, logging) = (lines.clone(), thread::current().id());
        thread::spawn(move || {
            assert_ne!(thread::current().id(), logging);
            let written = too_many(|line| copy.make_writer().write_all(line).unwrap());
            say.send(written).unwrap();
        });
        let written = hear
            .recv_timeout(PATIENCE)
            .expect("it waits for the writer");
        let dropped = lines.dropped();
        assert!(dropped > 0 && dropped < written, "{dropped} of {written}");
        assert!(!lines.flush(Duration::ZERO), "nothing is written yet");
        stuck.let_go();
        assert!(lines.flush(PATIENCE));
        let text = stuck.shared.0.lock().bytes.clone();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(&notice(dropped)), "the drop is not said");
        assert_eq!(text.matches('x').count() as u64, (written - dropped) << 10);
    }

    /// The twin: whoever writes to it directly waits until it is let go.
    #[test]
    fn whoever_writes_directly_waits() {
        let stuck = Stuck::default();
        let (say, hear) = mpsc::channel();
        let mut out = stuck.clone();
        let writing = thread::spawn(move || {
            say.send(()).unwrap();
            too_many(|line| out.write_all(line).unwrap());
        });
        hear.recv_timeout(PATIENCE).unwrap();
        for _ in 0..1_000 {
            thread::yield_now();
        }
        assert!(!writing.is_finished(), "the writer is not stuck");
        stuck.let_go();
        writing.join().unwrap();
    }
}
