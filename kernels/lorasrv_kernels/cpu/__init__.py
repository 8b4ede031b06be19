"""Native CPU kernels: C++ behind the same contracts as the reference, optional at run time."""
