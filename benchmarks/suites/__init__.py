"""The suites of ``benchmarks/run.py``, one module each with ``run(device, quick)``."""
