"""Measurements beside the peers, in one run, on the same input. Each prints its ratios and writes JSON."""
