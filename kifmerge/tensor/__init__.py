"""Pure mathematics on tensors: importance, selection, fusion, metrics. Knows no files."""
