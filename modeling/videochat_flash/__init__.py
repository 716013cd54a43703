"""VideoChat-Flash (arXiv 2501.00574); importing a configuration or modeling module registers its classes."""
