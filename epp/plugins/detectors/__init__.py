"""Detectors: how full the pool is."""
