"""Around training: how a run starts, the folder that it writes, what it saves, and who watches it."""
