"""InternVideo2-1B video encoder."""
