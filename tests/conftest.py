"""Shared by every test: fresh memory is NaN-filled, so that what is never written shows."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when anything first imports it
# Threads that wait give their core away: the suite may share it with another process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from kd.losses import chunks


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """torch.empty and its relatives (NaN, or the largest integer), and the losses' own memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    real = chunks.empty

    def filled(shape, dtype, device):
        made = real(shape, dtype, device)
        return made.fill_(float("nan")) if dtype.is_floating_point else made.fill_(255)

    monkeypatch.setattr(chunks, "empty", filled)
    yield
    torch.use_deterministic_algorithms(False)
