"""Knowledge distillation: objectives, teacher signals, alignment between two tokenizers, and the chunked head loss."""
