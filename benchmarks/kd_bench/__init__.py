"""What the benchmarks are made of; ``run.py`` and the ``bench_*.py`` beside this folder use it.

plain.py is the yardstick, shapes.py says what is measured, implementations.py who takes part,
worker.py and runner.py how it is measured, report.py and compare.py what is made of it.
"""
