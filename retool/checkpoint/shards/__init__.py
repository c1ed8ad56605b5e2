"""A sharded checkpoint as one: all ranks' files behind a single source of tensors and states."""
