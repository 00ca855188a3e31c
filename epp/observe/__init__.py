"""What operators see: metric cells and their exposition, structured logs."""
