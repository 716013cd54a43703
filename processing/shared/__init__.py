"""Decoding and frame sampling used by every architecture (functions of numbers, arrays and files)."""
