"""The gated MLP's elementwise half: one pass over memory in the forward, one in the backward."""
