"""How good the detections are: COCO average precision and the operating points that follow from it."""
