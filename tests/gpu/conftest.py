"""What the tests of a real GPU share. Without one they are skipped; with ``--thorough`` they run on the CPU."""

import pytest
import torch


@pytest.fixture(scope="session")
def device(request):
    """The GPU, where there is one."""
    if torch.cuda.is_available():
        return "cuda"
    if request.config.getoption("--thorough"):
        return "cpu"
    pytest.skip("no GPU here; --thorough runs this on the CPU")
