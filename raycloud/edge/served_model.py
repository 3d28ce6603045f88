"""Model that a server answers with, and its replacement by a newer version while requests run."""

from __future__ import annotations

from raycloud.edge.generation import RequestRunner
from raycloud.models.text_model import TextModel


class ServedModel:
    """Model whose versions replace each other while it is served.

    A request takes :attr:`current` once and keeps it to its last token. Weights, keys and values, chat template and
    grammars belong to the runner of one version, so no answer mixes two. A replaced version is freed when the last
    request that began with it ends.

    Args:
        model: the first version.
    """

    def __init__(self, model: TextModel) -> None:
        self._current = RequestRunner(model)

    @property
    def current(self) -> RequestRunner:
        """Runner of the version that answers new requests."""
        return self._current

    def replace(self, model: TextModel) -> None:
        """Answer the requests that begin from now on with another version."""
        self._current = RequestRunner(model)
