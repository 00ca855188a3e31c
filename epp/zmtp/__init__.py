"""ZMTP 3.0, the wire protocol of ZeroMQ: what engines publish their KV-cache events with, and what simulated ones do too."""
