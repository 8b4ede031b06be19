"""The demo: one server, several adapters, one mixed batch; who answered what.

It talks to the server as any client does, over gRPC, and runs it as a process of its own.
"""
