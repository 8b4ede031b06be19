"""One 4-bit base model, hundreds of adapters of any kind and rank, mixed in one batch, over gRPC.

Importing the package loads nothing heavy; the layers are its subpackages.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lorasrv")
except PackageNotFoundError:
    # a checkout on PYTHONPATH has no metadata
    __version__ = "0.0.0+source"

__all__ = ["__version__"]
