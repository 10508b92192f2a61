"""Reasoning traces: load, verify, filter, mix, render and pack them, with every drop counted.

Example:
    >>> from kd.traces import Numeric, Trace, verify
    >>> answered = [Trace("1+1=?", "one more", "2", reference="2"), Trace("2+2=?", "hm", "5")]
    >>> kept, report = verify(answered, Numeric())
    >>> len(kept), report["verify"].dropped
    (1, {'unknown: no reference': 1})
"""

from kd.traces.agreement import compare
from kd.traces.conversations import RenderError
from kd.traces.counts import DropCounts, StageCounts
from kd.traces.decontaminate import Evaluations, decontaminate
from kd.traces.dedupe import exact_duplicates, near_duplicates
from kd.traces.files import write_traces
from kd.traces.filters import Filter, Lint, OneLanguage, Tokens, filter_stream
from kd.traces.generation import complete, generate_local
from kd.traces.loading import load, to_dataset
from kd.traces.mixing import JsonlTraces, Source, mix
from kd.traces.packing import Pack, best_fit, collate_packs, efficiency, isolates_documents, pack
from kd.traces.rendering import CHATML, Renderer
from kd.traces.rows import AnyRenderer, as_recorded, render, render_rows, render_stream
from kd.traces.sampling import Sampling, overridden
from kd.traces.selecting import best_of_n, by_difficulty, diverse, pass_rate
from kd.traces.server import Server, generate_server
from kd.traces.tokens import Rendered
from kd.traces.trace import COMPACT, R1, SKY_T1, TAGS, Tags, Trace, split_completion
from kd.traces.verification import judge_all, verify, verify_stream
from kd.traces.verifiers import (
    VERIFIERS,
    Choice,
    Exact,
    Maths,
    Numeric,
    ReasoningGym,
    Verdict,
    Verifier,
    advice,
    final_answer,
    gym_problems,
    verifier,
)

__all__ = [
    "CHATML",
    "COMPACT",
    "R1",
    "SKY_T1",
    "TAGS",
    "VERIFIERS",
    "AnyRenderer",
    "Choice",
    "Evaluations",
    "Exact",
    "Filter",
    "JsonlTraces",
    "Lint",
    "Maths",
    "Numeric",
    "OneLanguage",
    "Pack",
    "ReasoningGym",
    "RenderError",
    "Rendered",
    "Renderer",
    "Sampling",
    "Server",
    "Source",
    "Tags",
    "StageCounts",
    "Tokens",
    "Trace",
    "Verdict",
    "Verifier",
    "DropCounts",
    "advice",
    "as_recorded",
    "best_fit",
    "best_of_n",
    "by_difficulty",
    "collate_packs",
    "compare",
    "complete",
    "decontaminate",
    "diverse",
    "efficiency",
    "exact_duplicates",
    "filter_stream",
    "final_answer",
    "generate_local",
    "generate_server",
    "gym_problems",
    "isolates_documents",
    "judge_all",
    "load",
    "mix",
    "near_duplicates",
    "overridden",
    "pack",
    "pass_rate",
    "render",
    "render_rows",
    "render_stream",
    "split_completion",
    "to_dataset",
    "verifier",
    "verify",
    "verify_stream",
    "write_traces",
]
