"""Data sources and extractors, by name."""
