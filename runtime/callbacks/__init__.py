"""runtime/callbacks."""
