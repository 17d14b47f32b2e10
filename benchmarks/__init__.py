"""Measurements of Refract against its peers, in one run, on the same input. Each program prints its ratios and writes JSON."""
