"""Multi-turn supervised fine-tuning."""
