"""Data sets: reading, drawing, augmenting and batching images with boxes, masks and keypoints."""
