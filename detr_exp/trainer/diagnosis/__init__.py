"""Checks, figures and tables that show what may be wrong with a training."""
