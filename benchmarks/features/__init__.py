"""What features cost and give, with real weights: `python -m benchmarks.features --stage NAME`."""
