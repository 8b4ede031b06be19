"""The base model: read once, held in 4 bits, asked one step at a time. Knows nothing of requests or scheduling."""
