"""Backbones: one file a family, with its variants and its checkpoint key map."""
