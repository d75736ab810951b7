"""EdgeDETR, a family of its own beside those of the package: what a stranger would write in an afternoon."""
