"""Split model for Python programs: text in, text out, with the middle blocks in the cloud or in this process."""

from __future__ import annotations

from collections.abc import Generator

from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.errors import LinkSetupError, ModelError
from raycloud.models.devices import Device, DType
from raycloud.models.generation import Decoding
from raycloud.models.sampling import Sampling
from raycloud.models.text_model import TextModel
from raycloud.models.verdict import structure_of
from raycloud.split.inference.generation import local_split_model, text_model
from raycloud.split.parts import load_splittable
from raycloud.split.plan import PlanSet, SplitPlan


class SplitModel:
    """Model whose blocks ``[start_block, end_block)`` run in the cloud and all others in this process.

    Args:
        text_model: the model with its tokenizer; :meth:`from_pretrained` loads one.
    """

    def __init__(self, text_model: TextModel) -> None:
        self.text_model = text_model

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        start_block: int | None = None,
        end_block: int | None = None,
        cloud: str | None = None,
        token: str | None = None,
        certificates: str | None = None,
        codec: str = "auto",
        device: Device = "auto",
        dtype: DType = "auto",
    ) -> SplitModel:
        """Load a model cut at two blocks.

        Args:
            model: a directory, GGUF file, hub id or ``builtin:`` name; with ``cloud`` also an exported ``edge``
                directory.
            start_block: first block of the cloud; may be left out with ``cloud``, which says where it is cut.
            end_block: block after the cloud's last one; likewise.
            cloud: address of the cloud, ``wss://host/v1/split``; None to run its blocks in this process too, without a
                codec.
            token: bearer token for the cloud.
            certificates: file of certificates to trust instead of the system's.
            codec: codec of the hidden states that cross the link; ``auto`` takes int8 if it is calibrated, else
                bfloat16.
            device: device of the blocks in this process.
            dtype: type of their parameters.

        Raises:
            LinkError: the cloud cannot be reached, refuses, or serves another model or other blocks.
            ModelError: the model cannot be loaded or cut so.
        """
        plans = None
        if start_block is not None and end_block is not None:
            plans = PlanSet.of(SplitPlan(start_block, end_block))
        elif cloud is None or (start_block is None) != (end_block is None):
            raise ModelError("a split needs start_block and end_block; only with a cloud may both be left out")
        if cloud is None:
            assert plans is not None
            whole = load_splittable(model, device=device, dtype=dtype)
            if not structure_of(whole.model.config).causal:
                raise ModelError(f"'{model}' is an encoder; only a causal language model writes text")
            edge = whole.edge(plans)
            return cls(text_model(edge, local_split_model(edge, whole.cloud(plans))))
        endpoint = CloudEndpoint(cloud, token, certificates)
        if plans is not None and endpoint.server_info().plans != plans:
            asked = f"[{start_block}, {end_block})"
            raise LinkSetupError(f"{cloud} does not run blocks {asked}; leave both out to use its own")
        return cls(load_split(model, endpoint, codec=codec, device=device, dtype=dtype))

    def generate(
        self, prompt: str, max_new_tokens: int = 128, *, temperature: float = 0.0, seed: int | None = None
    ) -> str:
        """Continue a text and return the continuation; see :meth:`stream`."""
        return "".join(self.stream(prompt, max_new_tokens, temperature=temperature, seed=seed))

    def stream(
        self, prompt: str, max_new_tokens: int = 128, *, temperature: float = 0.0, seed: int | None = None
    ) -> Generator[str, None, None]:
        """Yield the continuation of a text piece by piece, one per token.

        Args:
            prompt: text to continue.
            max_new_tokens: most tokens to generate.
            temperature: sampling temperature; 0 takes the most likely token.
            seed: seed that makes sampled texts reproducible.

        Raises:
            ValueError: the prompt is empty, or with its continuation longer than the model allows.
            LinkError: the link to the cloud broke and could not be restored.
        """
        decoding = Decoding(Sampling(temperature=temperature, seed=seed))
        for chunk in self.text_model.pieces(self.text_model.prompt(prompt), max_new_tokens, decoding):
            yield chunk.text
