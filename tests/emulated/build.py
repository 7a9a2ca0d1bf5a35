"""Builds the emulated device, where it is not in torch's cache of extensions yet, and tries it."""

from tests import emulated

if __name__ == "__main__":
    device = emulated.register()
    emulated.torch.ones(2, device=device).sum().item()
