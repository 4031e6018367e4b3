//! Calls any RPC of the protocol by its descriptor, with bodies that no generated client would send.

use prost::bytes::{Buf, BufMut};
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use swiftcache_proto::v1;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};

use crate::wire::Wire;

/// A codec that passes bodies on unchanged.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut body = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut body);
        Ok(Some(body))
    }
}

/// Every method of Broker and Admin.
///
/// # Errors
/// When the protocol's descriptors cannot be read.
pub fn methods() -> anyhow::Result<Vec<MethodDescriptor>> {
    let pool = DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET)?;
    Ok(pool
        .services()
        .flat_map(|service| service.methods().collect::<Vec<_>>())
        .collect())
}

/// Reads a request of the method from protobuf's text format.
///
/// # Errors
/// When the text is not a request of the method.
pub fn request(method: &MethodDescriptor, text: &str) -> anyhow::Result<DynamicMessage> {
    Ok(DynamicMessage::parse_text_format(method.input(), text)?)
}

/// The method's path, for example "/swiftcache.v1.Broker/Offer".
fn path(method: &MethodDescriptor) -> Result<PathAndQuery, Status> {
    let service = method.parent_service().full_name().to_owned();
    let path = format!("/{service}/{}", method.name());
    path.parse().map_err(|_| Status::internal(path))
}

/// Calls a method with the first of `bodies`. For a method whose requests are a stream, `bodies` are its messages, and the
/// last answer is returned. Of one that only answers with a stream, which may never end, no answer is waited for once the
/// request is accepted.
///
/// # Errors
/// When the broker answers with an error, or the connection fails.
pub fn call(
    wire: &Wire,
    method: &MethodDescriptor,
    bodies: Vec<Vec<u8>>,
) -> Result<Vec<u8>, Status> {
    let path = path(method)?;
    wire.wait(async {
        let mut grpc = Grpc::new(wire.channel());
        grpc.ready()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        if !method.is_client_streaming() {
            let body = bodies.into_iter().next().unwrap_or_default();
            if method.is_server_streaming() {
                let accepted = grpc.server_streaming(Request::new(body), path, Raw).await;
                return accepted.map(|_| Vec::new());
            }
            let answer = grpc.unary(Request::new(body), path, Raw).await?;
            return Ok(answer.into_inner());
        }
        let bodies = Request::new(tokio_stream::iter(bodies));
        let mut answers = grpc.streaming(bodies, path, Raw).await?.into_inner();
        let mut last = Vec::new();
        while let Some(answer) = answers.message().await? {
            last = answer;
        }
        Ok(last)
    })
}
