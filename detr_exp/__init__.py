"""A Hydra-driven experiment runner for real-time detection transformers."""
