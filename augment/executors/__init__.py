"""Executors run the passes of a plan: by OpenCV on one array, or by PyTorch on a batch."""
