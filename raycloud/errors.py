"""Errors a user can act on: one clear line each, and the exit code the command line ends with."""

from __future__ import annotations


class RaycloudError(Exception):
    """Something the user can mend; the message names the thing, its value and what is allowed."""

    exit_code = 2


class RecipeError(RaycloudError):
    """A recipe that cannot be read or does not validate."""


class ResultError(RaycloudError):
    """A result directory that may not be written, or cannot be resumed."""


class FetchError(RaycloudError):
    """A built-in package that is unknown, unreachable or does not match its recorded hash."""


class ModelError(RaycloudError):
    """A model that cannot be found, read or handled."""


class DataError(RaycloudError):
    """A data set that cannot be found, read, or that holds nothing to learn from."""


class TrainingError(RaycloudError):
    """Training that cannot go on, such as gradients that stay non-finite."""

    exit_code = 1


class ClusterError(RaycloudError):
    """A cluster that cannot hold the job."""


class MissingExtra(RaycloudError):
    """An optional dependency that this command needs."""

    def __init__(self, what: str, extra: str) -> None:
        self._parts = (what, extra)
        super().__init__(f"{what} needs the extra '{extra}': pip install 'raycloud[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), self._parts


class Interrupted(RaycloudError):
    """The user or the cluster asked the job to stop; what is on disk can be resumed."""

    exit_code = 130


class LinkError(RaycloudError):
    """A link that broke and could not be mended, or a peer that refused or broke the protocol."""

    exit_code = 1
