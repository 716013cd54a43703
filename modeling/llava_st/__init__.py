"""LLaVA-ST (arXiv 2501.08282); importing a configuration or modeling module registers its classes."""
