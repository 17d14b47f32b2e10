"""One program that measures Refract on a GPU: `python -m benchmarks.gpu`. See docs/gpu.md."""
