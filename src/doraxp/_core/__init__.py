"""One adapted layer: its checks, decomposition, norm, forward, backward and merge."""
