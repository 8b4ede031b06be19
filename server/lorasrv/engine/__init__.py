"""The engine: requests in, tokens out, every adapter in the same batch; one thread owns the device."""
