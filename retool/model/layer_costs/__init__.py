"""What one layer costs in memory and FLOPs. A family picks from here; `retool.model.costs` adds up."""
