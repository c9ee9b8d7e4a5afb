"""data_loading/io."""
