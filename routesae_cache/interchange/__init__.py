"""SAEs to and from other people's code: SAELens, sparsify, the RouteSAE authors' checkpoints."""
