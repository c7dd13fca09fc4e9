"""Attention for data on grids: images, volumes, light fields, multi-view sets, video and sequences."""

__version__ = "0.1.0"
