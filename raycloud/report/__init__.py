"""Output for people: progress, tables, plots and the report page of a result directory."""
