"""What the ranks of all machines find out together, before there is a process group."""
