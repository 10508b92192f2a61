"""The ``kd`` command: ``kd --help`` teaches it."""

from kd.cli.main import main

__all__ = ["main"]
