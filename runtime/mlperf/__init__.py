"""runtime/mlperf."""
