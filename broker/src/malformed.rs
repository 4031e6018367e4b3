//! Messages that are no protobuf are the caller's fault. tonic answers INTERNAL, which says that it is the broker's.

use http::{HeaderValue, Response};
use tonic::{Code, Status, body::Body};

/// How the error of a message that cannot be decoded begins.
const UNDECODABLE: &str = "failed to decode Protobuf message";

/// Whether a status says that the client's message could not be decoded.
fn is_malformed(status: &Status) -> bool {
    status.code() == Code::Internal && status.message().starts_with(UNDECODABLE)
}

/// Turns the answer to a message that could not be decoded into INVALID_ARGUMENT.
pub(crate) fn answer(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    if Status::from_header_map(headers).is_some_and(|status| is_malformed(&status)) {
        let code = Code::InvalidArgument as i32;
        headers.insert(Status::GRPC_STATUS, HeaderValue::from(code));
    }
    response
}

/// The same for a message in a stream.
pub(crate) fn status(status: Status) -> Status {
    match is_malformed(&status) {
        true => Status::invalid_argument(status.message()),
        false => status,
    }
}
