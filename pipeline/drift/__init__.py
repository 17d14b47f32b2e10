"""Drift: whether new data are still of the kind that a classifier was measured on. `profile` tells of data, `compare` of two profiles."""

from pipeline.drift.compare import Check, Drift, compare
from pipeline.drift.profile import Profile, profile
from pipeline.drift.thresholds import THRESHOLDS, Threshold, parse_thresholds

__all__ = ["THRESHOLDS", "Check", "Drift", "Profile", "Threshold", "compare", "parse_thresholds", "profile"]
