"""What the kernels raise.

ValueError
    KernelError    an argument breaks a kernel's contract: says what was expected and what came
"""


class KernelError(ValueError):
    """An argument breaks a kernel's contract."""
