"""Layer 0: tensors in, tensors out. Knows no adapter and no model."""
