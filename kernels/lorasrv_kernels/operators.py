"""Declares ops of torch.library: each by the named tuple of its arguments, which checks and implementations are given.

Knows the dispatcher, and how a tuple's fields become a schema; knows no op.
"""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules

P = ParamSpec("P")
A = TypeVar("A")
T = TypeVar("T")

library = torch.library.Library("lorasrv", "FRAGMENT")
"""What all ops are registered with."""

versions: dict[tuple[str, str], Callable[..., Any]] = {}
"""What serves an op under a dispatch key, so that it can be had where the device is not."""

_TYPES: dict[Any, str] = {
    type(None): "()",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    list[Tensor]: "Tensor[]",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    int: "int",
    float: "float",
    bool: "bool",
}


def define(
    name: str,
    arguments: Callable[P, A],
    *,
    reference: Callable[[A], T],
    check: Callable[[A], None] | None = None,
    shape: Callable[[A], T] | None = None,
    mutates: str | None = None,
    cpu: Callable[[A], T | bool | None] | None = None,
    cuda: Callable[[A], T] | None = None,
) -> Callable[P, T]:
    """Registers an op and returns it.

    Args:
        name: of the op, in the namespace `lorasrv`.
        arguments: a named tuple, a tensor first; the schema is made from its fields. A tuple, because a frozen
            dataclass takes longer to make than the dispatcher to dispatch.
        reference: serves where no other version does.
        check: raises KernelError where the arguments break the contract; runs before whatever serves.
        shape: the result, unset; None for an op in place.
        mutates: what an op in place writes.
        cpu: the native version. Where it has none it returns None or False, having written nothing, and the reference
            serves; an op in place that has served returns True.
        cuda: the version for CUDA; it runs with the device of the first argument as the current one.
    """
    library.define(name + _schema(arguments, get_type_hints(reference)["return"], mutates))
    _register(name, "CompositeExplicitAutograd", arguments, check, reference)
    _register(name, "Meta", arguments, check, shape or _nothing)
    if cpu is not None:
        _register(name, "CPU", arguments, check, cpu, reference)
    if cuda is not None:
        _register(name, "CUDA", arguments, check, _on_its_device(cuda))
    op: Callable[P, T] = getattr(torch.ops.lorasrv, name).default
    return op


def in_triton(
    module: str, name: str, reference: Callable[[A], T], *, serves: Callable[[A], bool] | None = None
) -> Callable[[A], T]:
    """The function of this name in a module that imports Triton, which the first call loads.

    Where there is no Triton, or `serves` says no, it is the reference.
    """

    def run(call: A) -> T:
        kernels = None if serves and not serves(call) else triton_modules.load(module)
        version: Callable[[A], T] = reference if kernels is None else getattr(kernels, name)
        return version(call)

    return run


def like_first(call: tuple[Any, ...]) -> Tensor:
    """An unset result of the shape and dtype of the first argument."""
    first: Tensor = call[0]
    return first.new_empty(first.shape)


def _schema(arguments: Any, result: Any, mutates: str | None) -> str:
    defaults: dict[str, Any] = arguments._field_defaults
    parameters = [
        ("Tensor(a!)" if name == mutates else _TYPES[kind])
        + f" {name}"
        + (f"={defaults[name]}" if name in defaults else "")
        for name, kind in get_type_hints(arguments).items()
    ]
    results = f"({', '.join(_TYPES[part] for part in get_args(result))})" if get_args(result) else _TYPES[result]
    return f"({', '.join(parameters)}) -> {results}"


def _register(
    name: str,
    key: str,
    arguments: Any,
    check: Callable[..., None] | None,
    version: Callable[..., Any],
    otherwise: Callable[..., Any] | None = None,
) -> None:
    count, defaults = len(arguments._fields), tuple(arguments._field_defaults.values())
    check = check or _nothing

    def run(*given: Any) -> Any:
        # the dispatcher leaves out what equals its default; the tuple's own constructor takes thrice as long
        call = tuple.__new__(arguments, given if len(given) == count else given + defaults[len(given) - count :])
        check(call)
        result = version(call)
        if result is None or result is False:
            return None if otherwise is None else otherwise(call)
        return None if result is True else result

    versions[name, key] = run
    library.impl(name, run, key)


def _on_its_device(version: Callable[..., T]) -> Callable[..., T]:
    def run(call: tuple[Any, ...]) -> T:
        with torch.cuda.device_of(call[0]):
            return version(call)

    return run


def _nothing(_call: object) -> None:
    """Checks nothing; the shape function of an op in place."""
