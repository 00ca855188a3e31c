"""What people ask a running picker: metrics, the last decisions, why a request would go where."""
