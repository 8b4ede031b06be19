"""Version 1 of the wire contract, package `lorasrv.v1`. `python proto/generate.py` writes the generated modules."""
