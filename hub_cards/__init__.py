"""Model cards: one source per architecture, rendered from a checkpoint folder by `longvideo card`."""
