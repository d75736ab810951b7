"""Experiment tracking: metrics and images are written to the run folder, and copied to views (MLflow, ...)."""
