"""Adapters: few trained parameters added to a network whose own parameters are frozen."""
