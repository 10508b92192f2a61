"""The teacher's log-probabilities on disk: content-addressed, resumable, checked, small.

    with CacheWriter("cache", meta) as writer:
        writer.add(input_ids, ids, logprobs)              # [L], [L, K], [L, K]
    cache = TeacherCache("cache", expect={"temperature": 2.0})
    targets = cache.lookup(input_ids)                     # ids, logprobs [L, K]

The bytes are described in FORMAT.md; ``kd.teachers.build_cache`` fills a cache from a model.
"""

from kd.cache.hidden import HiddenCache, HiddenTargets, HiddenWriter
from kd.cache.keys import sequence_key
from kd.cache.meta import CacheMeta
from kd.cache.reader import SparseTargets, TeacherCache
from kd.cache.writer import CacheWriter

__all__ = [
    "CacheMeta",
    "CacheWriter",
    "HiddenCache",
    "HiddenTargets",
    "HiddenWriter",
    "SparseTargets",
    "TeacherCache",
    "sequence_key",
]
