"""What a run sends between its GPUs, and how much of it a step waits for."""
