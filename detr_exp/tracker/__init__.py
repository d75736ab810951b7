"""Where numbers and pictures of a run go: files in the run folder first, views of them after."""
