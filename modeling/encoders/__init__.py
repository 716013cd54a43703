"""Video and image towers that transformers lacks, each with its own configuration."""
