"""Envoy's external-processing protocol: transports (h2, grpc_aio) around one sans-IO session per stream."""
