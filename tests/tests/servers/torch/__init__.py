"""A stand-in for PyTorch, on the path of TorchServe's workers only: they import it to ask whether an answer is a tensor.

PyPI's torch for Linux brings some gigabytes of CUDA with it, and our handler computes with numpy. Nothing of PyTorch is
imitated; whoever asks for more gets an AttributeError that names it.
"""


class Tensor:
    """A type that nothing has."""
