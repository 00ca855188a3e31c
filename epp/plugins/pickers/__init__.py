"""Pickers: from totals to endpoints."""
