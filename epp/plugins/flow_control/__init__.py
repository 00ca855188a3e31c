"""Flow-control policies, by name."""
