"""LongVU (arXiv 2410.17434); importing a configuration or modeling module registers its classes."""
