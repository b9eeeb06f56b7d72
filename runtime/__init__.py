"""The sampling runtime: artifacts, engines, the sampler, volumes.

Symbols, the same in Python, C++ and the tests: `x` a latent or volume `[N, C, D, H, W]` (2D: `[N, C, H, W]`),
`t` a training timestep index, `alpha_bar` the cumulative product of 1 - beta, `eps` predicted noise.
"""
