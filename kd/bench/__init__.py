"""Benchmarks that can be run from an installed package: ``kd bench``.

plain.py is the yardstick, shapes.py says what is measured, implementations.py who takes part,
worker.py and runner.py how it is measured, report.py and compare.py what is made of it.
"""
