"""What a GRPO or DAPO run checks before it starts, besides what every run does."""
