"""Architectures of the zoo, one folder each, over tensor functions (`layers`) and shared towers (`encoders`)."""
