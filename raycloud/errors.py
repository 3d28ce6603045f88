"""Errors that a user can act on: a message of one line each, and the exit code of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RaycloudError(Exception):
    """Error that the user can fix; the message names the thing, its value and what is allowed."""

    exit_code = 2


class RecipeError(RaycloudError):
    """Recipe that cannot be read or does not validate."""


class ResultError(RaycloudError):
    """Result directory that may not be written, or cannot be resumed."""


class ChecksumError(RaycloudError):
    """File that is missing, or whose content differs from its recorded checksum."""


class StorageError(RaycloudError):
    """File or folder that cannot be written, such as on a full disk."""


class FetchError(RaycloudError):
    """Built-in package that cannot be downloaded, or that does not match its recorded hash."""

    exit_code = 1


class NoBuiltinError(FetchError):
    """Unknown name of a built-in."""

    exit_code = 2


class ModelError(RaycloudError):
    """Model that cannot be found, read or handled."""


@contextmanager
def about(who: str) -> Iterator[None]:
    """Prefix the message of a ``ModelError`` raised inside with ``who``, the name of one of several models."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{who}: {error}") from error


class DataError(RaycloudError):
    """Data set that cannot be found or read, or that has nothing to train on."""


class TrainingError(RaycloudError):
    """Training that cannot continue, such as with gradients that stay non-finite."""

    exit_code = 1


class ClusterError(RaycloudError):
    """Part of a job that failed or does not answer on the cluster."""

    exit_code = 1


class ClusterSetupError(ClusterError):
    """Cluster that cannot be used: nothing answers at its address, or it lacks resources for the job."""

    exit_code = 2


class MissingExtra(RaycloudError):
    """Optional dependency that a command needs and that is not installed.

    Args:
        what: command or feature that needs it.
        extra: name of the extra that installs it.
    """

    def __init__(self, what: str, extra: str) -> None:
        self._parts = (what, extra)
        super().__init__(f"{what} needs the extra '{extra}': pip install 'raycloud[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), self._parts


class Interrupted(RaycloudError):
    """Request by the user or the cluster to stop the job; the run can be resumed from what is on disk."""

    exit_code = 130


class LinkError(RaycloudError):
    """Link that broke and could not be restored, or a peer that refused or violated the protocol."""

    exit_code = 1


class LinkSetupError(LinkError):
    """Link that cannot be set up with the given address, token, certificates, model or codec."""

    exit_code = 2
