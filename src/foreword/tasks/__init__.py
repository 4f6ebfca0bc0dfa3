"""What turns rows into inputs, logits into a loss, and predictions into metrics: one module per task."""
