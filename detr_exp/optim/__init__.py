"""Learning rates: which parameter has which, and how they change from step to step."""
