"""Maps of a backbone to maps of a decoder."""
