"""The doctor: watches a training, and says in words what is wrong, by what evidence, and what to change."""

from pipeline.doctor.finding import Finding
from pipeline.doctor.watch import Doctor

__all__ = ["Doctor", "Finding"]
