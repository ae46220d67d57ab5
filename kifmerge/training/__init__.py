"""Training: steps that score importance, the recurrent loop, KIF, and state to go on from."""
