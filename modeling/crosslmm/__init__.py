"""CrossLMM (arXiv 2505.17020); importing a configuration or modeling module registers its classes."""
