"""Protobuf messages to the server's own values and back, one module per `.proto` file; nothing else does this."""
