"""runtime/checkpoint."""
