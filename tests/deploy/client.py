"""A client of the broker that learns the protocol by reflection, as any other program could."""

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

# For a Unix socket, grpcio's default authority is the escaped path, which HTTP/2 servers refuse.
AUTHORITY = [("grpc.default_authority", "localhost")]


def channel(socket, options=AUTHORITY):
    return grpc.insecure_channel(f"unix:{socket}", options=options)


class Client:
    def __init__(self, socket):
        self.channel = channel(socket)
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def __call__(self, service, method, **fields):
        found = self.pool.FindServiceByName(f"swiftcache.v1.{service}").FindMethodByName(method)
        request = message_factory.GetMessageClass(found.input_type)
        response = message_factory.GetMessageClass(found.output_type)
        invoke = self.channel.unary_unary(
            f"/swiftcache.v1.{service}/{method}",
            request_serializer=request.SerializeToString, response_deserializer=response.FromString,
        )
        return invoke(request(**fields), timeout=60)
