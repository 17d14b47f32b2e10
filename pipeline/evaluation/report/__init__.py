"""The report of an evaluation: one HTML file with its images inside, and the same numbers as JSON."""

from refract.pipeline.evaluation.report.build import Report, make_report

__all__ = ["Report", "make_report"]
