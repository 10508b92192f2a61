"""The codecs by name."""

from __future__ import annotations

from kd.cache.codecs import Codec, Float32
from kd.cache.compact import Compact, Counts, Log8
from kd.cache.states import HiddenBF16, HiddenFP8

_ALL: tuple[Codec, ...] = (
    Float32(),
    Log8(),
    Compact(),
    Counts(),
    HiddenBF16(),
    HiddenFP8(),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
