"""Jobs: ``run(recipe) -> Result``, the only callers of ``ray.init``."""
