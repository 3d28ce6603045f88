"""The cloud's side of split inference: the engine computes, sessions remember, the host speaks the protocol."""
