"""Files: atomic writing and importance snapshots. Knows no rule."""
