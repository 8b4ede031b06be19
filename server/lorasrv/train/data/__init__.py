"""From data files to token batches with a supervision mask. Knows the tokenizer; knows no tensor and no adapter."""
