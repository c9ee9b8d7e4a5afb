"""data_loading/readers."""
