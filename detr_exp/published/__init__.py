"""Weights that others have published: what there is, where it comes from, and its place on this machine."""
