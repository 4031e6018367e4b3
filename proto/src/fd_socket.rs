//! What travels on the fd socket: fixed-size frames on a Unix stream socket, one request and one reply a
//! connection. A descriptor cannot cross gRPC, so it rides beside the frame as SCM_RIGHTS.
//!
//! * upload (donor): request frame with the descriptor; reply frame.
//! * fetch (lessee): request frame; reply frame with the descriptor when the status is [`Status::Ok`].

use crate::domain::{AllocationId, SessionId};

/// Bytes of a request frame.
pub const REQUEST_BYTES: usize = 25;
/// Bytes of a reply frame.
pub const REPLY_BYTES: usize = 1;

const UPLOAD: u8 = 1;
const FETCH: u8 = 2;

/// What a client asks of the fd socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Keep the descriptor that comes with this frame for offers of `allocation` by `session`.
    Upload {
        /// The donor's session.
        session: SessionId,
        /// The allocation the descriptor maps.
        allocation: AllocationId,
    },
    /// Give the descriptor that `token` was granted for. Good once.
    Fetch {
        /// From the grant's handle.
        token: [u8; 16],
    },
}

/// How the broker answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The frame is not of this form, or its descriptor is missing.
    Malformed = 1,
    /// The session is not the peer's.
    NotYours = 2,
    /// The token is unknown, used up, too old, or another process's.
    NoSuchToken = 3,
    /// The broker keeps as many descriptors as it may.
    Full = 4,
}

impl Request {
    /// The frame.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut frame = [0; REQUEST_BYTES];
        match self {
            Self::Upload {
                session,
                allocation,
            } => {
                frame[0] = UPLOAD;
                frame[1..9].copy_from_slice(&session.0.to_le_bytes());
                frame[9..].copy_from_slice(&allocation.0);
            }
            Self::Fetch { token } => {
                frame[0] = FETCH;
                frame[9..].copy_from_slice(token);
            }
        }
        frame
    }

    /// Reads a frame; `None` when it is malformed.
    pub fn decode(frame: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let (kind, rest) = frame.split_first()?;
        let (session, id) = rest.split_first_chunk::<8>()?;
        let id: [u8; 16] = id.try_into().ok()?;
        let session = u64::from_le_bytes(*session);
        match *kind {
            UPLOAD => Some(Self::Upload {
                session: SessionId(session),
                allocation: AllocationId(id),
            }),
            FETCH if session == 0 => Some(Self::Fetch { token: id }),
            _ => None,
        }
    }
}

impl Status {
    /// Reads a reply frame; `None` when it is malformed.
    pub fn decode(frame: [u8; REPLY_BYTES]) -> Option<Self> {
        [
            Self::Ok,
            Self::Malformed,
            Self::NotYours,
            Self::NoSuchToken,
            Self::Full,
        ]
        .into_iter()
        .find(|status| *status as u8 == frame[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_trip() {
        let requests = [
            Request::Upload {
                session: SessionId(0x0123_4567_89ab_cdef),
                allocation: AllocationId([7; 16]),
            },
            Request::Fetch { token: [9; 16] },
        ];
        for request in requests {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
    }

    #[test]
    fn an_unknown_kind_is_malformed() {
        let mut frame = Request::Fetch { token: [9; 16] }.encode();
        frame[0] = 3;
        assert_eq!(Request::decode(&frame), None);
        assert_eq!(Status::decode([5]), None);
        assert_eq!(Status::decode([4]), Some(Status::Full));
    }
}
