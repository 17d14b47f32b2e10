"""Tracking in MLflow: each training has one run. Entries go to a journal in the run's folder, and from there to the server."""

from refract.pipeline.tracking.address import DEFAULT_URI, tracking_uri
from refract.pipeline.tracking.tracker import Tracker, TrackingError

__all__ = ["DEFAULT_URI", "Tracker", "TrackingError", "tracking_uri"]
