"""One file per phase: data and model in, training, evaluation and report out."""
