"""Shared by every test: fresh memory is NaN-filled, so that what is never written shows."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
