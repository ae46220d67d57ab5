"""The merge engine: checked inputs, rules, and whole models fused piece by piece. No training."""
