"""Simulated model servers: vLLM's API, metrics and prefix cache without a GPU, for the demo, the benches and the tests."""
