"""One file per phase: plain arguments in, a small result out."""
