"""Errors that say what a user did and what to do about it: the command line prints the message and exits with 2."""

import errno


class UserError(Exception):
    """Something the user did or can mend. The message says what was wrong, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be read, has an unknown key or an impossible value, or makes no sense as a whole."""


class DataError(UserError):
    """A data folder or shard that is missing, empty, unreadable or of another shape than the configuration says."""


class RunFolderError(UserError):
    """A run folder that belongs to another configuration, or whose files cannot be read or written."""


_WRITE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
# torch and safetensors raise classes of their own, RuntimeError among them.
_LIBRARY_WRITE_ERRORS = (
    "inline_container.cc",
    "PytorchStreamWriter",
    "iostream error",
    "No space left on device",
    "File too large",
)


def write_failure(error: BaseException) -> str | None:
    """The message for an error that a full or read-only disk, or a quota, causes; None for any other error."""
    if isinstance(error, OSError):
        if error.errno not in _WRITE_ERRORS or isinstance(error, ConnectionError):
            return None
    elif not any(words in str(error) for words in _LIBRARY_WRITE_ERRORS):
        return None
    first = (str(error).splitlines() or [""])[0]
    return f"a file could not be opened or written: {first}. Is the disk full, or the folder read-only?"
