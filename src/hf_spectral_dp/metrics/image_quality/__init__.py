"""Quality of generated images for the `evaluate` library; the metric is in `image_quality.py`."""
