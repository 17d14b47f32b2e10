"""The contenders of `benchmarks.transfer`: each trains on one manifest and prints its test accuracy as the last line, in JSON."""
