"""Reporters: what a response adds to headers and metadata."""
