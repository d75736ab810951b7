"""Decoders: from the maps of a neck to the predictions of queries."""
