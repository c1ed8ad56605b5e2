"""Mixtures of experts: who computes a token, the experts' products, and what keeps them balanced."""
