"""What the exit status of a command says, and which error ends in which.

Errors are recognized by the names in their class tree, so that no package has to be imported to know its errors.
"""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit statuses of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    INVALID = 3
    """Bad configuration or data."""
    NOT_FOUND = 4
    UNAVAILABLE = 5
    """No server, or one that cannot take this now."""
    DENIED = 6
    """Not authenticated, or not allowed."""
    NO_RESOURCES = 7
    """Out of memory or disk."""
    INTERRUPTED = 130


_BY_ERROR: dict[str, ExitCode] = {
    # lorasrv.errors
    "ConfigError": ExitCode.INVALID,
    "ModelLoadError": ExitCode.INVALID,
    "TrainingDataError": ExitCode.INVALID,
    "MergeVerificationError": ExitCode.FAILURE,
    "MergeError": ExitCode.INVALID,
    "InvalidRequestError": ExitCode.INVALID,
    "QueueFullError": ExitCode.UNAVAILABLE,
    "DrainingError": ExitCode.UNAVAILABLE,
    "EngineDownError": ExitCode.UNAVAILABLE,
    "DiskFullError": ExitCode.NO_RESOURCES,
    "LorasrvError": ExitCode.FAILURE,
    # lorasrv_adapters.errors
    "AdapterIncompatibleError": ExitCode.INVALID,
    "AdapterCorruptError": ExitCode.INVALID,
    "AdapterConversionError": ExitCode.INVALID,
    "AdapterNotFoundError": ExitCode.NOT_FOUND,
    "SourceNotFoundError": ExitCode.NOT_FOUND,
    "SourceNotAllowedError": ExitCode.DENIED,
    "HubAccessDeniedError": ExitCode.DENIED,
    "HubUnreachableError": ExitCode.UNAVAILABLE,
    "SlotsExhaustedError": ExitCode.NO_RESOURCES,
    "AdapterError": ExitCode.FAILURE,
    # lorasrv_client.errors; AdapterNotFoundError and AdapterCorruptError are named as above
    "InvalidArgumentError": ExitCode.INVALID,
    "AdapterInvalidError": ExitCode.INVALID,
    "NotFoundError": ExitCode.NOT_FOUND,
    "OverloadedError": ExitCode.UNAVAILABLE,
    "UnavailableError": ExitCode.UNAVAILABLE,
    "DeadlineExceededError": ExitCode.UNAVAILABLE,
    "AuthenticationError": ExitCode.DENIED,
    "PermissionDeniedError": ExitCode.DENIED,
    "OutOfResourcesError": ExitCode.NO_RESOURCES,
    "ClientError": ExitCode.FAILURE,
    # lorasrv.demo
    "DemoError": ExitCode.FAILURE,
    # Python's and torch's
    "OutOfMemoryError": ExitCode.NO_RESOURCES,
    "MemoryError": ExitCode.NO_RESOURCES,
    "PermissionError": ExitCode.DENIED,
    "FileNotFoundError": ExitCode.NOT_FOUND,
    "OSError": ExitCode.FAILURE,
}


def exit_code_for(error: BaseException) -> ExitCode | None:
    """The exit status an error ends in; None for an error nobody foresaw, which deserves its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitCode.NO_RESOURCES
    return next((_BY_ERROR[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _BY_ERROR), None)
