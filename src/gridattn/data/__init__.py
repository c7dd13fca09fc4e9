"""Dataset readers and embedded real samples."""
