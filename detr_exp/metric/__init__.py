"""Metrics of detections: COCO average precision, operating points, charts and comparisons of runs."""
