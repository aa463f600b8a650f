"""What the report shows of single examples."""

import numpy as np
import pytest
from PIL import Image

from qlx.training.samples import _tint


@pytest.mark.parametrize("sure", [True, False])
def test_a_picture_is_coloured_where_the_model_sees_something(sure):
    picture = Image.new("RGB", (80, 48), (40, 40, 40))
    logits = np.full((2, 6, 10), -20, np.float32)
    if sure:
        logits[1, 2, 7] = 20
    _tint(picture, logits)
    pixels = np.asarray(picture).astype(int)
    at = pixels[20, 60]  # the middle of that cell
    assert bool(at[0] > 150 and at[2] > 120 and at[1] < 80) is sure
    assert (pixels[:, :40] == 40).all()
