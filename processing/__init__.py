"""Video, image and text processing: shared readers and samplers, then one folder per architecture."""
