"""Makes the small checkpoints that come with the package: sizes, curriculum, training script."""
