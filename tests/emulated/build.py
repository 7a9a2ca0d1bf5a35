"""Builds the emulated device, unless torch's cache of extensions has it, and computes one sum on it."""

from tests import emulated

if __name__ == "__main__":
    device = emulated.register()
    emulated.torch.ones(2, device=device).sum().item()
