"""A trained network as one graph, and the engines that run it."""
