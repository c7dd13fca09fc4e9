"""Drop-in replacements for the public interfaces of other libraries."""
