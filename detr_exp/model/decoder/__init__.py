"""Decoders: from the maps of a neck to what queries say."""
