"""Process mesh, parameter sharding (FSDP) and sequence parallelism (Ulysses)."""
