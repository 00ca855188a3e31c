"""Deciders: whether a request's stages are worth splitting over endpoints."""
