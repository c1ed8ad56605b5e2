"""Checkpoints: sharded files that any world size resumes from, Hugging Face folders in and out."""
