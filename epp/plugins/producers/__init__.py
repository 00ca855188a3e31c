"""Producers: data about one request, made before filters and scorers run."""
