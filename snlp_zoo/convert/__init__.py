"""Other people's checkpoints as models of this zoo: one module for each kind, `convert(src, dst, ...)` in each."""
