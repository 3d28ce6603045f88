"""Jobs, one file each: a job runs a recipe and writes a result directory."""
