"""Functions of tensors and plain numbers: no configuration objects, no parameters, nothing of the floors above."""
