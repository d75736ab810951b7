"""Teachers: trained networks whose predictions and maps are targets in a training."""
