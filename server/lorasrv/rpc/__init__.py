"""The gRPC service: the only part of the server that sees protobuf. It sees no tensor."""
