//! Watches for the death of processes. Only its death proves that a process can access nothing any more.

use std::{collections::HashMap, io, os::fd::OwnedFd};

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    task::AbortHandle,
};

use crate::{
    core::Process,
    peer::{self, Image, Peer},
};

/// The watched processes. Their deaths are sent to a channel.
pub struct DeathWatch {
    watched: HashMap<Process, Watched>,
    gone: mpsc::UnboundedSender<Process>,
}

struct Watched {
    task: AbortHandle,
    /// The program that has the sessions, where the broker may look.
    image: Option<Image>,
}

impl DeathWatch {
    /// A watch of no processes, which sends deaths to `gone`.
    pub fn new(gone: mpsc::UnboundedSender<Process>) -> Self {
        Self {
            watched: HashMap::new(),
            gone,
        }
    }

    /// Starts watching a process that has connected.
    ///
    /// # Errors
    /// When its pidfd cannot be watched.
    pub fn watch_peer(&mut self, peer: &Peer) -> io::Result<()> {
        if self.watched.contains_key(&peer.process) {
            return Ok(());
        }
        let pidfd = peer.pidfd.try_clone()?;
        self.watch(peer.process, pidfd, peer.image)
    }

    /// The program that a watched process ran when the watch began, as far as that is known.
    pub fn image(&self, process: Process) -> Option<Image> {
        self.watched.get(&process)?.image
    }

    /// Starts watching a process that the ledger names. A process that is gone is reported at once. A process that
    /// cannot be watched counts as alive until it reconnects.
    pub fn watch_known(&mut self, process: Process) {
        if self.watched.contains_key(&process) {
            return;
        }
        let watched = match peer::reopen(process) {
            // What it has become while no broker was there is not known.
            Ok(Some(pidfd)) => self.watch(process, pidfd, Image::of(process)),
            Ok(None) => {
                self.report(process);
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = watched {
            tracing::warn!(
                pid = process.pid, uid = process.uid, %error,
                "a process that may hold leases cannot be watched; it counts as alive until it reconnects"
            );
        }
    }

    /// Stops watching a process.
    pub fn unwatch(&mut self, process: Process) {
        if let Some(watched) = self.watched.remove(&process) {
            watched.task.abort();
        }
    }

    /// How many processes are watched.
    pub fn count(&self) -> usize {
        self.watched.len()
    }

    fn report(&self, process: Process) {
        // This fails only when the broker is shutting down.
        let _ = self.gone.send(process);
    }

    fn watch(&mut self, process: Process, pidfd: OwnedFd, image: Option<Image>) -> io::Result<()> {
        #[expect(
            deprecated,
            reason = "its unsafe successor is needed only for types that can give up their descriptor, and an OwnedFd \
                      cannot"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        let gone = self.gone.clone();
        let task = tokio::spawn(async move {
            match pidfd.readable().await {
                Ok(_) => {
                    let _ = gone.send(process);
                }
                Err(error) => {
                    tracing::error!(pid = process.pid, %error, "a pidfd cannot be watched")
                }
            }
        });
        let task = task.abort_handle();
        self.watched.insert(process, Watched { task, image });
        Ok(())
    }
}

impl Drop for DeathWatch {
    fn drop(&mut self) {
        for watched in self.watched.values() {
            watched.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixListener,
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// A process that lives until it is killed and has no connection.
    fn child() -> (Child, Process) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let birth = stat.rsplit_once(')').unwrap().1;
        let birth = birth.split_ascii_whitespace().nth(19).unwrap();
        let process = Process {
            pid: child.id(),
            birth: birth.parse().unwrap(),
            uid: 0,
        };
        (child, process)
    }

    #[tokio::test]
    async fn the_death_of_a_process_is_reported_and_nothing_before_it() {
        let (sender, mut deaths) = mpsc::unbounded_channel();
        let mut watch = DeathWatch::new(sender);
        let (mut first, first_process) = child();
        let (mut second, second_process) = child();
        watch.watch_known(first_process);
        watch.watch_known(second_process);
        assert_eq!(watch.count(), 2);
        second.kill().unwrap();
        assert_eq!(deaths.recv().await, Some(second_process));
        assert!(deaths.try_recv().is_err(), "the first one lives");
        first.kill().unwrap();
        assert_eq!(deaths.recv().await, Some(first_process));
        first.wait().unwrap();
        second.wait().unwrap();
    }

    #[tokio::test]
    async fn a_process_that_died_before_the_watch_is_reported_too() {
        let (sender, mut deaths) = mpsc::unbounded_channel();
        let mut watch = DeathWatch::new(sender);
        let (mut child, process) = child();
        child.kill().unwrap();
        child.wait().unwrap();
        watch.watch_known(process);
        assert_eq!(deaths.recv().await, Some(process));
    }

    #[tokio::test]
    async fn an_unwatched_process_dies_unnoticed() {
        let (sender, mut deaths) = mpsc::unbounded_channel();
        let mut watch = DeathWatch::new(sender);
        let (mut quiet, quiet_process) = child();
        let (mut loud, loud_process) = child();
        watch.watch_known(quiet_process);
        watch.watch_known(loud_process);
        watch.unwatch(quiet_process);
        quiet.kill().unwrap();
        quiet.wait().unwrap();
        loud.kill().unwrap();
        assert_eq!(deaths.recv().await, Some(loud_process));
        assert!(deaths.try_recv().is_err());
        loud.wait().unwrap();
    }

    #[tokio::test]
    async fn a_peer_is_watched_through_its_connection() {
        let (sender, mut deaths) = mpsc::unbounded_channel();
        let mut watch = DeathWatch::new(sender);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "death::tests::connects_and_waits", "--ignored"])
            .env("CONNECT_TO", &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (connection, _) = listener.accept().unwrap();
        let peer = Peer::of(&connection).unwrap();
        assert_eq!(peer.process.pid, child.id());
        watch.watch_peer(&peer).unwrap();
        child.kill().unwrap();
        assert_eq!(deaths.recv().await, Some(peer.process));
        child.wait().unwrap();
    }

    #[test]
    #[ignore = "the child process of a_peer_is_watched_through_its_connection"]
    fn connects_and_waits() {
        let path = std::env::var_os("CONNECT_TO").unwrap();
        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        std::io::Read::read(&mut stream, &mut [0]).unwrap();
    }
}
