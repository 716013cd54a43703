"""Architectures of the zoo, one folder each, over shared tensor functions (`layers`) and shared towers (`encoders`)."""

# Loading it first lets the waiting registration (longvideo/_registration.py) run before a file of this folder is half
# imported; whichever file is asked for first then finds the others whole.
import transformers.models.auto.modeling_auto  # noqa: F401
