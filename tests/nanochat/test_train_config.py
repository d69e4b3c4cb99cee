"""What TrainConfig refuses: the one place where a flag's value is checked by itself."""

import math

import pytest

from nanochat.errors import BadInput
from nanochat.train_config import TrainConfig

COUNTS = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size", "keep", "max_bad_steps")
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
REFUSED = {
    **dict.fromkeys(COUNTS, (0, -1)),
    **dict.fromkeys(RATES, (-0.1, math.nan, math.inf)),
    **dict.fromkeys(("warmdown_ratio", "final_lr_frac"), (-0.1, 1.5, math.nan)),
    "warmup_steps": (-1,),
}
TAKEN = {"warmdown_ratio": (0, 1), "final_lr_frac": (0, 1), "warmup_steps": (0,), "weight_decay": (0,), "device_batch_size": (1,)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_its_range_is_refused_by_its_flag(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"^--{name.replace('_', '-')} is {value}: it must be .*[01]"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TAKEN.items() for value in values])
def test_the_ends_of_a_range_belong_to_it(name: str, value: float) -> None:
    assert getattr(TrainConfig(**{name: value}), name) == value
