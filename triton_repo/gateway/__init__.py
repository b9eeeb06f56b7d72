"""The gateway: HTTP for people and programs in front of a Triton that only it may reach."""
