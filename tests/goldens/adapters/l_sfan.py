"""L-SFAN: its goldens are whole networks."""

from case import Adapter

ADAPTERS: dict[str, Adapter] = {}
PENDING = {"hand": "the whole network is not built yet", "LSFAN": "the whole network is not built yet"}
