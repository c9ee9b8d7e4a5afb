"""runtime/distributed."""
