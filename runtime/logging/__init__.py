"""runtime/logging."""
