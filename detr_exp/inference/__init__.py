"""A trained detector on images, videos and data sets."""
