"""Tools on top of the library: compare mechanisms, and show where a pixel looks."""
