"""What finished runs have left behind: read, compared and shown."""
