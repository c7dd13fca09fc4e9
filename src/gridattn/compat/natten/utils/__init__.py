"""`natten.utils`."""

from gridattn.compat.natten.utils import varlen

__all__ = ["varlen"]
