"""Continual learning without forgetting: importance-guided fusion of checkpoints."""
