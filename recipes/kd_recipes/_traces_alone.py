"""Configs of the recipes that train on traces alone."""

from __future__ import annotations

from kd_recipes._flow import OFFLINE, Config, Training


def published(name: str, title: str, size: str, *, traces: str, rows: int, source: str) -> Config:
    """SFT as Sky-T1, Bespoke-Stratos and OpenThinker did it, for a size of Qwen2.5-Instruct."""
    return Config(
        recipe=name,
        title=title,
        output=f"runs/{name}-{size}",
        student=f"Qwen/Qwen2.5-{size}-Instruct",
        teacher="",
        traces=traces,
        tags="sky_t1",
        max_length=16_384,
        sft=Training(epochs=3.0, learning_rate=1e-5, warmup=0.1, batch=96),
        shape=size,
        rows_expected=rows,
        source=source,
    )


def offline(name: str, title: str) -> Config:
    """The same stages with tiny models that know sums; the teacher only writes the traces."""
    return Config(
        recipe=name,
        title=title,
        output=f"runs/{name}-offline",
        max_traces=200,
        verifier="exact",
        teacher="",
        max_length=96,
        sft=Training(
            epochs=3.0,
            learning_rate=5e-4,
            warmup=0.1,
            batch=16,
            train_embeddings=False,
            checkpoints=2,
        ),
        problems=OFFLINE,
        problem_verifier="exact",
        test_problems=200,
        max_new_tokens=40,
        source="those of the offline r1_to_qwen, and its tags, which the tiny student knows",
    )
