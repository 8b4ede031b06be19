"""Training: adapters of every kind over the frozen base, written as PEFT folders. Knows no engine and no server."""
