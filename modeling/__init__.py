"""Architectures of the zoo, one folder each, over shared tensor functions (`layers`) and shared towers (`encoders`)."""
