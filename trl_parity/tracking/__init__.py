"""W&B and trackio: scalars, alerts, tables, the workspace."""
