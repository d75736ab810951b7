"""Data sets: reading, drawing, augmenting and batching pictures with boxes, masks and keypoints."""
