"""The nuisances that the stage is tried with."""

import pytest
from stage_inputs import NUISANCES


@pytest.fixture(params=NUISANCES)
def nuisance(request):
    return NUISANCES[request.param]()
