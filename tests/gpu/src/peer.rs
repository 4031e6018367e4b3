//! A second process with the same backend, which does what it is asked. It is a donor or a borrower that a check can
//! kill.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use swiftcache_client::device::{Export, Memory};
use swiftcache_proto::domain::{DeviceUuid, Handle, HandleKind, OpaqueHandle};
use thiserror::Error;

use crate::{
    pattern,
    subject::{Backend, Subject},
};

/// The requests to a peer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Take HBM, write a pattern and export it.
    Donate {
        /// The device.
        device: DeviceUuid,
        /// Bytes to allocate.
        bytes: u64,
        /// The kind of handle to export.
        kind: HandleKind,
        /// The seed of the pattern to write, if any.
        seed: Option<u64>,
    },
    /// Map the export that comes with the request.
    Import {
        /// The device that will use the memory.
        device: DeviceUuid,
        /// The device on which the memory is.
        owner: DeviceUuid,
        /// Bytes of the export.
        bytes: u64,
    },
    /// Check a pattern in memory number `memory`.
    Verify {
        /// The number that `Donate` or `Import` returned.
        memory: u64,
        /// The seed of the pattern.
        seed: u64,
    },
    /// Overwrite memory number `memory` with a pattern.
    Fill {
        /// The number that `Donate` or `Import` returned.
        memory: u64,
        /// The seed of the pattern.
        seed: u64,
    },
    /// Return how much HBM of a device is free.
    Hbm {
        /// The device.
        device: DeviceUuid,
    },
    /// Return the PID that the process itself sees.
    Pid,
    /// Drop memory number `memory`.
    Drop {
        /// The number that `Donate` or `Import` returned.
        memory: u64,
    },
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Done,
    Memory(u64),
    Pid(u32),
    Free(u64),
    Failed(String),
    Unavailable(String),
}

/// A message, and the export that comes with it.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope<T> {
    message: T,
    opaque: Option<(HandleKind, Vec<u8>)>,
}

/// A peer could not open its backend.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct BackendUnavailable(String);

/// A second process.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    socket: UnixStream,
}

impl Peer {
    /// Starts a peer that opens the subject's backend.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(subject: &Subject) -> Result<Self> {
        Self::start_as(Command::new(&subject.peer_program), subject)
    }

    /// Starts a peer by a command to which the arguments of the peer's program are added.
    ///
    /// # Errors
    /// When the command cannot be run.
    pub fn start_as(mut command: Command, subject: &Subject) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = command
            .arg("peer")
            .arg(serde_json::to_string(&subject.backend)?)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .with_context(|| format!("starting {}", subject.peer_program.display()))?;
        Ok(Self { child, socket })
    }

    /// Asks for memory. Returns its number and its export.
    ///
    /// # Errors
    /// When the peer fails or is gone.
    pub fn donate(
        &mut self,
        device: &DeviceUuid,
        bytes: u64,
        kind: HandleKind,
        seed: Option<u64>,
    ) -> Result<(u64, Export)> {
        let request = Request::Donate {
            device: device.clone(),
            bytes,
            kind,
            seed,
        };
        match self.exchange(request, None)? {
            (Reply::Memory(number), Some(export)) => Ok((number, export)),
            other => bail!("the peer answered {other:?}"),
        }
    }

    /// Makes the peer map an export. Returns the memory's number.
    ///
    /// # Errors
    /// When the peer fails or is gone.
    pub fn import(
        &mut self,
        device: &DeviceUuid,
        owner: &DeviceUuid,
        export: Export,
        bytes: u64,
    ) -> Result<u64> {
        let request = Request::Import {
            device: device.clone(),
            owner: owner.clone(),
            bytes,
        };
        match self.exchange(request, Some(export))? {
            (Reply::Memory(number), _) => Ok(number),
            other => bail!("the peer answered {other:?}"),
        }
    }

    /// Makes a request whose answer has no content.
    ///
    /// # Errors
    /// When the peer fails or is gone.
    pub fn ask(&mut self, request: Request) -> Result<()> {
        self.exchange(request, None).map(|_| ())
    }

    fn exchange(
        &mut self,
        request: Request,
        export: Option<Export>,
    ) -> Result<(Reply, Option<Export>)> {
        send(&mut self.socket, request, export)?;
        let received = receive(&mut self.socket)?.context("the peer process is gone")?;
        match received {
            (Reply::Failed(problem), _) => bail!("{problem}"),
            (Reply::Unavailable(problem), _) => bail!(BackendUnavailable(problem)),
            answer => Ok(answer),
        }
    }

    /// The PID of the peer as the peer sees it. In its own PID namespace, it is not the PID that this process sees.
    ///
    /// # Errors
    /// When the peer's backend did not open, or the peer is gone.
    pub fn own_pid(&mut self) -> Result<u32> {
        match self.exchange(Request::Pid, None)? {
            (Reply::Pid(pid), _) => Ok(pid),
            other => bail!("the peer answered {other:?}"),
        }
    }

    /// Free HBM of a device in bytes, as the peer sees it. If the peer has no context on the device yet, this creates
    /// one.
    ///
    /// # Errors
    /// When the peer fails or is gone.
    pub fn free_hbm(&mut self, device: &DeviceUuid) -> Result<u64> {
        let device = device.clone();
        match self.exchange(Request::Hbm { device }, None)? {
            (Reply::Free(bytes), _) => Ok(bytes),
            other => bail!("the peer answered {other:?}"),
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // After a check that failed, the peer may still run. Errors here do not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the second process: serves requests from standard input, which is a socket, until it is closed.
///
/// # Errors
/// When the socket fails. If the backend does not open, the answer to the first request says so.
pub fn serve(backend: &Backend) -> Result<()> {
    let mut socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
    let layer = match backend.open() {
        Ok(layer) => layer,
        Err(error) => {
            receive::<Request>(&mut socket)?;
            return send(&mut socket, Reply::Unavailable(format!("{error:#}")), None);
        }
    };
    let mut memories: HashMap<u64, (Memory, DeviceUuid)> = HashMap::new();
    let mut latest = 0;
    while let Some((request, export)) = receive::<Request>(&mut socket)? {
        let answer = || -> Result<(Reply, Option<Export>)> {
            match request {
                Request::Donate {
                    device,
                    bytes,
                    kind,
                    seed,
                } => {
                    let memory = layer.allocate(&device, bytes, kind)?;
                    if let Some(seed) = seed {
                        pattern::write(&*layer.stream(&device)?, &memory, 0, bytes, seed)?;
                    }
                    let export = layer.export(&memory)?;
                    latest += 1;
                    memories.insert(latest, (memory, device));
                    Ok((Reply::Memory(latest), Some(export)))
                }
                Request::Import {
                    device,
                    owner,
                    bytes,
                } => {
                    let export = export.context("no export came along")?;
                    let memory = layer.import(&device, &owner, export, bytes)?;
                    latest += 1;
                    memories.insert(latest, (memory, device));
                    Ok((Reply::Memory(latest), None))
                }
                Request::Verify { memory, seed } => {
                    let (memory, device) = memories.get(&memory).context("no such memory")?;
                    let stream = layer.stream(device)?;
                    pattern::verify(&*stream, memory, 0, memory.bytes(), seed)?;
                    Ok((Reply::Done, None))
                }
                Request::Fill { memory, seed } => {
                    let (memory, device) = memories.get(&memory).context("no such memory")?;
                    let stream = layer.stream(device)?;
                    pattern::write(&*stream, memory, 0, memory.bytes(), seed)?;
                    Ok((Reply::Done, None))
                }
                Request::Hbm { device } => Ok((Reply::Free(layer.hbm(&device)?.free), None)),
                Request::Pid => Ok((Reply::Pid(std::process::id()), None)),
                Request::Drop { memory } => {
                    memories.remove(&memory).context("no such memory")?;
                    Ok((Reply::Done, None))
                }
            }
        };
        let (reply, export) =
            answer().unwrap_or_else(|error| (Reply::Failed(format!("{error:#}")), None));
        send(&mut socket, reply, export)?;
    }
    Ok(())
}

/// Sends a frame: its length in four bytes, with the descriptor if there is one, and then JSON.
fn send<T: Serialize>(socket: &mut UnixStream, message: T, export: Option<Export>) -> Result<()> {
    let (opaque, descriptor) = match export {
        None => (None, None),
        Some(Export::Fd(descriptor)) => (None, Some(descriptor)),
        Some(Export::Opaque(handle)) => {
            let (Handle::CudaIpc(bytes) | Handle::Fabric(bytes)) = &handle else {
                bail!("a descriptor is not opaque");
            };
            (Some((handle.kind(), bytes.0.to_vec())), None)
        }
    };
    let json = serde_json::to_vec(&Envelope { message, opaque })?;
    let length = u32::try_from(json.len())?.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_ref().map(|descriptor| [descriptor.as_fd()]);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(&length)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    socket.write_all(&length[sent..])?;
    socket.write_all(&json)?;
    Ok(())
}

/// Receives a frame. Returns none at the end of the stream.
fn receive<T: DeserializeOwned>(socket: &mut UnixStream) -> Result<Option<(T, Option<Export>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut length)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut export = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next().map(Export::Fd),
        _ => None,
    });
    socket.read_exact(&mut length[received.bytes..])?;
    let mut json = vec![0; u32::from_le_bytes(length) as usize];
    socket.read_exact(&mut json)?;
    let envelope: Envelope<T> = serde_json::from_slice(&json)?;
    if let Some((kind, bytes)) = envelope.opaque {
        let bytes = OpaqueHandle(bytes.try_into().ok().context("a handle has 64 bytes")?);
        export = Some(Export::Opaque(match kind {
            HandleKind::CudaIpc => Handle::CudaIpc(bytes),
            HandleKind::Fabric => Handle::Fabric(bytes),
            HandleKind::PosixFd => bail!("a descriptor is not opaque"),
        }));
    }
    Ok(Some((envelope.message, export)))
}
