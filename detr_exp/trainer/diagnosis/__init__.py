"""What a training looks at to say what may be wrong with it."""
