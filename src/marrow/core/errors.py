"""The tree of errors a user can meet.

    MarrowError                     exit 1: something failed
    |- UsageError                   exit 2: the command was asked wrongly
    |  `- RecipeError               a recipe key, value or unit (file and line)
    |- SourceError                  input rows are missing, empty or unreadable
    |- DataError                    rows were read, but cannot make what was asked
    |- StoreError                   the artifact store
    |  |- ArtifactNotFound          no artifact answers to that name
    |  |- StaleVersion              a branch was moved by someone else meanwhile
    |  |- MergeConflict             two branches changed the same files differently
    |  |- UnsavedFiles              files of the user would be overwritten
    |  |- Conflict                  another writer was first
    |  `- DamagedBlob               bytes on disk do not match their hash
    |- ResourceError                the machine said no
    |  |- DiskFull                  no space left
    |  |- NotPermitted              no permission
    |  |- Unreachable               a remote endpoint does not answer, or not in time
    |  `- PortInUse                 the address is taken
    |- ModelError                   a config, checkpoint or model folder is unusable
    |- TrainError                   the run cannot go on (NaN loss, ...)
    `- ServeError                   the engine or the server
       `- RequestError              one request is refused (HTTP 4xx)

A message says what happened, the value and what is allowed; `hint` says what to do next.
`Interrupted` stands beside the tree: the user stopped the work (exit 130).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MarrowError(Exception):
    """Something failed in a way that the user can act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(MarrowError):
    """The command was asked wrongly."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe key, value or unit is wrong."""


class SourceError(MarrowError):
    """Input rows are missing, empty or unreadable."""


class DataError(MarrowError):
    """Rows were read, but cannot make what was asked."""


class StoreError(MarrowError):
    """The artifact store cannot do what was asked."""


class ArtifactNotFound(StoreError):
    """No artifact answers to that name."""


class Conflict(StoreError):
    """Another writer was first."""


class StaleVersion(StoreError):
    """A branch was moved by someone else meanwhile."""


class MergeConflict(StoreError):
    """Two branches changed the same files differently."""


class UnsavedFiles(StoreError):
    """Files of the user would be overwritten or deleted."""


class DamagedBlob(StoreError):
    """Bytes on disk do not match their hash."""


class ResourceError(MarrowError):
    """The machine said no."""


class DiskFull(ResourceError):
    """No space is left on the device."""


class NotPermitted(ResourceError):
    """The operating system refuses access."""


class Unreachable(ResourceError):
    """A remote endpoint does not answer, or not in time."""


class PortInUse(ResourceError):
    """Another process listens on the address."""


class ModelError(MarrowError):
    """A model config, checkpoint or folder is unusable."""


class TrainError(MarrowError):
    """The training run cannot go on."""


class ServeError(MarrowError):
    """The engine or the server failed."""


class RequestError(ServeError):
    """One request is refused; the engine goes on."""

    def __init__(
        self, message: str, *, hint: str | None = None, status: int = 400, param: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param


class Interrupted(Exception):
    """The user stopped the work; what was finished is kept."""

    exit_code = 130


@contextmanager
def explain_os_errors(doing: str, path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into errors with a hint.

    Args: doing: what the block does, as in "write the checkpoint"; what begins with "read" needs no
        more than to be readable. path: where.
    Raises: DiskFull, NotPermitted, SourceError; any other OSError passes unchanged.
    """
    try:
        yield
    except OSError as error:
        # A temporary beside its target says nothing to a user.
        named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        where = next((name for name in named if not Path(name).name.startswith(".tmp-")), str(path))
        if refusal := refusal_of(error, doing, where):
            raise refusal from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise SourceError(
                f"cannot {doing}: {where}: {(error.strerror or 'not found').lower()}",
                hint="check the path; relative paths start at the working folder",
            ) from error
        raise


def refusal_of(error: OSError, doing: str, where: str) -> ResourceError | None:
    """Return what a full disk or a missing permission is told as; None for all else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"cannot {doing}: no space left at {where}",
            hint="free some space, or set MARROW_HOME to a folder on a larger disk; "
            "then run the same command again, finished work is kept",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reads = doing.startswith("read")
        return NotPermitted(
            f"cannot {doing}: no permission at {where}",
            hint="make it readable for you, its folder too"
            if reads
            else "make the folder writable, or set MARROW_HOME to a folder that you own",
        )
    return None
