"""Measure the loop of review, correction and feedback: `python -m benchmarks.loop --stage STAGE`."""
