"""Slow, plain versions of the fast code, written from the papers' equations and the specification."""
