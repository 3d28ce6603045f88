"""What people look at: progress, tables, plots and the page of a result directory."""
