"""How many workers nodes take, and what is said where they take too few."""

from __future__ import annotations

import pytest

from genpipe.launch.placement import GIB, check_places, inventory, needs_of, places
from genpipe.stage_config import Resources

BIG = {"CPU": 96.0, "GPU": 8.0, "memory": 1000.0 * GIB, "accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0}
SMALL = {"CPU": 8.0, "memory": 30.0 * GIB, "node:10.0.0.2": 1.0, "object_store_memory": 1e9}


def test_a_worker_asks_for_nothing_that_is_not_set() -> None:
    assert needs_of(Resources()) == {"CPU": 1.0}
    assert needs_of(Resources(gpus=2, accelerator_type="H100", memory=4, custom={"disk": 3})) == {
        "CPU": 1.0,
        "GPU": 2.0,
        "disk": 3.0,
        "memory": 4.0 * 2**30,
        "accelerator_type:H100": 0.001,
    }


@pytest.mark.parametrize(
    ("asked", "fit"),
    [
        ({}, 8 + 96 + 96),
        ({"cpus": 5}, 1 + 19 + 19),  # what is left on one node is no place with what is left on another
        ({"gpus": 1}, 16),
        ({"gpus": 3}, 4),
        ({"accelerator_type": "H100"}, 192),
        ({"accelerator_type": "A100"}, 0),
        ({"memory": 31}, 64),
        ({"custom": {"disk": 1}}, 0),
        ({"cpus": 0.1}, 80 + 1920),
    ],
)
def test_as_many_fit_as_each_node_takes(asked: dict[str, object], fit: int) -> None:
    assert places(needs_of(Resources.model_validate(asked)), [SMALL, BIG, BIG]) == fit


def test_too_few_places_are_refused_with_all_that_there_is() -> None:
    check_places("prior", Resources(gpus=4), [SMALL, BIG], least=2)
    with pytest.raises(ValueError) as refused:
        check_places("prior", Resources(cpus=2, gpus=4, accelerator_type="H100"), [SMALL, BIG, BIG], least=5)
    assert str(refused.value).startswith(
        "stages.prior.resources: a worker takes 2 CPU, 4 GPU (H100), and 4 of 5 workers fit; there are "
        "1 node with 8 CPU, 30 GiB; 2 nodes with 96 CPU, 8 GPU (H100), 1,000 GiB. "
    )
    with pytest.raises(ValueError, match="no node has room for one worker; there are no nodes"):
        check_places("prior", Resources(), [], least=1)
    assert inventory([{"disk": 2.0}]) == "1 node with 2 disk"


def test_the_process_that_validates_needs_a_place_beside_the_workers() -> None:
    asked = {"cpus": 2, "gpus": 4, "accelerator_type": "H100", "validation": {"cpus": 90, "gpus": 1}}
    check_places("prior", Resources.model_validate(asked), [SMALL, BIG, BIG], least=3)
    with pytest.raises(ValueError) as refused:
        check_places("prior", Resources.model_validate(asked), [SMALL, BIG, BIG], least=4)
    assert str(refused.value).startswith(
        "stages.prior.resources: a worker takes 2 CPU, 4 GPU (H100), the process that validates beside them 90 CPU, "
        "1 GPU (H100), and no node has room for it beside 4 workers; there are 1 node with 8 CPU"
    )
    with pytest.raises(ValueError, match="no node has room for it beside 1 worker;"):
        check_places("prior", Resources.model_validate(asked | {"validation": {"gpus": 9}}), [BIG, BIG], least=1)


def test_none_of_it_is_in_the_fingerprint() -> None:
    from genpipe import config
    from genpipe.stage_config import UNFINGERPRINTED, StageConfig

    named = Resources(gpus=2, accelerator_type="H100", memory=4, custom={"disk": 3}, placement="SPREAD")
    assert config.changed(StageConfig(resources=named), without=UNFINGERPRINTED) == {}
