"""One model measured: on problems, on a text, and beside a teacher's cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kd.evaluation.answers import Evaluation, evaluate
from kd.evaluation.likelihood import Closeness, Likelihood, closeness, likelihood
from kd.evaluation.problems import read_problems
from kd.evaluation.texts import blocks, documents
from kd.models import load_model, load_tokenizer, mixed_precision
from kd.progress import Progress
from kd.serving import KEY_VARIABLE
from kd.traces import AnyRenderer, DropCounts, Sampling, Server, as_recorded, render_rows, verifier
from kd.traces.verifiers.registry import DEFAULT

BLOCK = 512


@dataclass(frozen=True)
class Plan:
    """What is measured of every model, and how its answers are drawn and judged.

    Attributes:
        problems: a file of questions and answers, "gym:NAME[:k=v,...]", or None.
        text: a .txt, a .jsonl or a folder, for perplexity.
        traces: what the cache was built from; with ``cache``.
        cache: a teacher's cache of these traces.
        verifier: its name; reasoning-gym's own for its problems, else the default.
        samples: answers to each problem.
        pass_at: each at most ``samples``.
        temperature: 0 is greedy; when None 0 for one sample, 0.6 for several.
        top_p: of the sampling.
        max_new_tokens: of an answer; longer ones are cut.
        batch_size: answers drawn side by side.
        limit: only the first so many problems or traces; 0 is all.
        seed: of the sampling, and of generated problems.
        chat: whether prompts are wrapped with the chat template.
        server: address of an OpenAI-compatible server; models are its names.
        key_variable: environment variable with the server's key.
        output: folder for a server's answers, where a rerun finds them.

    Raises:
        ValueError: nothing is to be measured, or what is given does not go together.
    """

    problems: str | None = None
    text: Path | None = None
    traces: Path | None = None
    cache: Path | None = None
    verifier: str | None = None
    samples: int = 1
    pass_at: tuple[int, ...] = (1,)
    temperature: float | None = None
    top_p: float = 0.95
    max_new_tokens: int = 4096
    batch_size: int = 16
    limit: int = 0
    seed: int = 0
    chat: bool = True
    server: str | None = None
    key_variable: str = KEY_VARIABLE
    output: Path | None = None

    def __post_init__(self) -> None:
        if not (self.problems or self.text or self.cache):
            raise ValueError(
                "evaluate: something to measure must be given, got none. Add --problems, --text, "
                "or --traces with --cache."
            )
        if bool(self.cache) != bool(self.traces):
            raise ValueError("evaluate: --cache and --traces must be given together, got one.")
        if self.server and (self.text or self.cache):
            raise ValueError(
                "evaluate: --server must be used with --problems alone, got --text or --cache "
                "too. They need the model's own probabilities: give a local model."
            )
        if not all(1 <= k <= self.samples for k in self.pass_at):
            raise ValueError(
                f"evaluate: --pass-at must be from 1 to --samples ({self.samples}), got "
                f"{','.join(map(str, self.pass_at))}."
            )

    @property
    def judged_by(self) -> str:
        """The name of the verifier."""
        gym = (self.problems or "").startswith("gym:")
        return self.verifier or ("gym" if gym else DEFAULT)


@dataclass
class Measured:
    """What is known of one model; None for what was not asked for."""

    answers: Evaluation | None = None
    text: Likelihood | None = None
    traces: Likelihood | None = None
    teacher: Closeness | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        plain: dict[str, Any] = {}
        if self.answers is not None:
            plain["problems"] = self.answers.to_dict()
        if self.text is not None:
            plain["text"] = {"perplexity": self.text.perplexity, "interval": self.text.interval}
        if self.teacher is not None:
            close = self.teacher
            plain["teacher"] = {
                "kl": close.kl,
                "top1": close.top1,
                "calibration": close.calibration,
            }
        return plain


def measure(label: str, name: str, plan: Plan) -> Measured:
    """Everything that the plan asks for, of one model.

    Args:
        label: what the model is called in progress lines and files.
        name: a folder or hub id; with ``plan.server`` the model's name there.
        plan: what to measure.
    """
    found = Measured()
    if plan.server:
        server = Server(plan.server, name, key_variable=plan.key_variable)
        found.answers = _ask(label, plan, server=server)
        return found
    tokenizer = load_tokenizer(name)
    if plan.cache:
        _same_tokenizer(tokenizer, plan.cache)
    model = load_model(name).eval()
    if plan.problems:
        found.answers = _ask(label, plan, model=model, tokenizer=tokenizer)
    if plan.text:
        length = min(BLOCK, getattr(model.config, "max_position_embeddings", BLOCK))
        rows = list(blocks(tokenizer, documents(plan.text), length))
        with Progress(f"{label}: reading", len(rows)) as bar, mixed_precision():
            found.text = likelihood(model, rows, progress=bar.to)
    if plan.cache and plan.traces:
        from kd.cache import TeacherCache

        cache = TeacherCache(plan.cache)
        rows = _rendered(plan.traces, tokenizer, plan.limit, cache.manifest.rendering)
        with Progress(f"{label}: beside the teacher", len(rows)) as bar, mixed_precision():
            found.traces, found.teacher = closeness(model, cache, rows, progress=bar.to)
    return found


def _ask(label: str, plan: Plan, **who: Any) -> Evaluation:
    problems = read_problems(plan.problems or "", plan.limit, plan.seed)
    temperature = plan.temperature
    if temperature is None:
        temperature = 0.0 if plan.samples == 1 else 0.6
    journal = None
    if plan.server and plan.output:
        plan.output.mkdir(parents=True, exist_ok=True)
        journal = plan.output / f"{label}.answers.jsonl"
    words = f"{label}: answering, at most {plan.max_new_tokens:,} tokens each"
    with Progress(words, len(problems) * plan.samples) as bar:
        return evaluate(
            problems,
            verifier(plan.judged_by),
            n=plan.samples,
            sampling=Sampling(temperature, plan.top_p, plan.max_new_tokens, plan.seed),
            batch_size=plan.batch_size,
            chat=plan.chat,
            journal=journal,
            progress=bar.to,
            **who,
        )


def _same_tokenizer(tokenizer: Any, path: Path) -> None:
    from kd.cache import TeacherCache
    from kd.vocab import fingerprint_differences, tokenizer_fingerprint

    cached = TeacherCache(path).meta.tokenizer
    found = fingerprint_differences(cached, tokenizer_fingerprint(tokenizer)) if cached else []
    serious = [words for words in found if not words.startswith("template")]
    if serious:
        raise ValueError(
            "evaluate: the model must have the cache's tokenizer, got differences (cache and "
            f"model): {'; '.join(serious[:4])}. Use a cache in the model's own ids."
        )


def _rendered(path: Path, tokenizer: Any, limit: int, way: dict[str, Any]) -> list[dict[str, Any]]:
    report = DropCounts()
    rows = render_rows(path, AnyRenderer(tokenizer, **as_recorded(way)), report=report)
    found = [row._asdict() for row in islice(rows, limit or None)]
    if not found:
        raise ValueError(
            f"evaluate: --traces must hold rows that can be rendered, got none in {path}:\n"
            f"{report.table()}"
        )
    return found
