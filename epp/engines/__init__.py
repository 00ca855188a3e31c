"""Inference engines as seen through their `/metrics`: what each family calls its gauges, and the loop that reads them."""
