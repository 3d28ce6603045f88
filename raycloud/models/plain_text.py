"""Text sides of multimodal models for which the library has no language model, as the plain text models they equal.

Their rotary positions have three axes: time, height and width of an image. In a text the three are the same number, and
every pair of entries is rotated by it, whichever axis it belongs to, as in the plain model.
"""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.models.twin import LOADING_SETTINGS

_PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Type of the plain text model by the type of a text side; both name their tensors and settings alike."""
_AXES = ("mrope_section", "mrope_interleaved")
"""Settings of rotary positions that divide the entries of a head among the axes."""


def plain_config(text: PretrainedConfig) -> PretrainedConfig:
    """Configuration of the plain text model that gives a text side's logits of texts; ``text`` itself if none does."""
    kind = _PLAIN.get(text.model_type)
    if kind is None:
        return text
    given = {name: value for name, value in text.to_dict().items() if name not in LOADING_SETTINGS}
    rope = given.get("rope_parameters") or {}
    given["rope_parameters"] = {name: value for name, value in rope.items() if name not in _AXES}
    return CONFIG_MAPPING[kind](**given)
