"""Image classification with any backbone of the library."""
