"""The passes of a plan on images: by OpenCV on one array, or by PyTorch on a batch."""
