"""From a base and an adapter to one model: what changes, the new folder, and the proof that it answers as before."""
