"""mdm: masked diffusion language models of code, distilled from autoregressive teachers."""

import os

# In a source checkout the packages train/, eval/, serve/ and benchmarks/ lie beside this folder;
# an installed mdm contains them, and then this line must do nothing.
_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(_here)
if os.path.isfile(os.path.join(_root, "pyproject.toml")) and not os.path.isdir(
    os.path.join(_here, "train")
):
    __path__.append(_root)
