"""The report of an evaluation: one HTML file with embedded images, and the same numbers as JSON."""

from refract.pipeline.evaluation.report.build import Report, make_report

__all__ = ["Report", "make_report"]
