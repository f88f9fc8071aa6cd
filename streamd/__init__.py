"""streamd: tokens from inference servers to ten thousand readers over Server-Sent Events."""

__version__ = "0.1.0"
