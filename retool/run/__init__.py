"""While it lasts: how a run starts, the folder that it writes, what it saves, who watches it."""
