"""Admitters: whether a request is served now."""
