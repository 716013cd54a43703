"""Metrics, procedural videos, question answering and benchmarks."""
