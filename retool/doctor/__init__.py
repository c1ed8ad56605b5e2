"""`retool doctor`: what is wrong with the machines and the network between them, before a run."""
