"""UMT-L video encoder."""
