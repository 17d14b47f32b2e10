"""MLflow: one run a training. What is to be tracked goes into a journal in the run's folder, and from there to the server."""

from pipeline.tracking.tracker import DEFAULT_URI, Tracker, TrackingError, tracking_uri

__all__ = ["DEFAULT_URI", "Tracker", "TrackingError", "tracking_uri"]
